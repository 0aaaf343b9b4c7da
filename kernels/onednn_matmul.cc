#include "kernels/onednn_matmul.h"

#include <dlfcn.h>

#include <cstring>
#include <oneapi/dnnl/dnnl.hpp>
#include <random>
#include <unordered_map>
#include <vector>

#include "kernels/tensor.h"

namespace switchyard {
namespace {

using Memory = dnnl::memory;

// Of the OpenMP runtime that oneDNN brought along, whichever that is.
void SetOpenMpThreads(int num_threads) {
  auto* set = reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
  SY_CHECK(set != nullptr);
  set(num_threads);
}

void StopOpenMpThreads() {
  constexpr int kSoft = 1;  // omp_pause_soft
  auto* pause = reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  SY_CHECK(pause != nullptr);
  SY_CHECK_EQ(pause(kSoft), 0);
}

void Fill(const Memory& memory, OneDnnType type, uint64_t seed) {
  std::mt19937_64 random(seed);
  const size_t bytes = memory.get_desc().get_size();
  if (type == OneDnnType::kInt8) {
    uint8_t* p = static_cast<uint8_t*>(memory.get_data_handle());
    for (size_t i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(random() >> 56);
    return;
  }
  const auto fill = [&](auto* p, auto convert) {
    for (size_t i = 0; i < bytes / sizeof(*p); ++i)
      p[i] = convert(static_cast<float>(random() >> 40) * 0x1p-23f - 1.0f);
  };
  if (type == OneDnnType::kBF16) {
    fill(static_cast<bf16*>(memory.get_data_handle()), ToBF16);
  } else {
    fill(static_cast<float*>(memory.get_data_handle()), [](float v) { return v; });
  }
}

Memory::desc Desc(int64_t rows, int64_t columns, Memory::data_type type, Memory::format_tag tag) {
  return Memory::desc({rows, columns}, type, tag);
}
Memory::desc XDesc(const OneDnnMatmul::Shape& s) {
  using Type = Memory::data_type;
  const Type type = s.type == OneDnnType::kBF16  ? Type::bf16
                    : s.type == OneDnnType::kF32 ? Type::f32
                                                 : Type::u8;
  return Desc(s.m, s.k, type, Memory::format_tag::ab);
}
Memory::desc WeightDesc(const OneDnnMatmul::Shape& s, Memory::format_tag tag) {
  const Memory::data_type type =
      s.type == OneDnnType::kInt8 ? Memory::data_type::s8 : XDesc(s).data_type();
  return Desc(s.k, s.n, type, tag);
}
Memory::desc OutDesc(const OneDnnMatmul::Shape& s) {
  return Desc(s.m, s.n, Memory::data_type::f32, Memory::format_tag::ab);
}
// Empty where oneDNN cannot.
dnnl::matmul::primitive_desc Primitive(const OneDnnMatmul::Shape& s, const dnnl::engine& engine) {
  return {dnnl::matmul::desc(XDesc(s), WeightDesc(s, Memory::format_tag::any), OutDesc(s)), engine,
          /*allow_empty=*/true};
}

}  // namespace

struct OneDnnMatmul::State {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::matmul matmul;
  Memory x, out;
  std::vector<Memory> weights;
};

bool OneDnnMatmul::Supports(OneDnnType type) {
  const Shape shape = {.type = type, .m = 16, .n = 64, .k = 64};
  return static_cast<bool>(Primitive(shape, dnnl::engine(dnnl::engine::kind::cpu, 0)));
}

OneDnnMatmul::OneDnnMatmul(const Shape& s, int num_threads) : state_(std::make_unique<State>()) {
  SetOpenMpThreads(num_threads);
  const dnnl::matmul::primitive_desc primitive = Primitive(s, state_->engine);
  SY_CHECK(static_cast<bool>(primitive));
  state_->matmul = dnnl::matmul(primitive);
  state_->x = Memory(XDesc(s), state_->engine);
  state_->out = Memory(OutDesc(s), state_->engine);
  Fill(state_->x, s.type, 1);
  Memory plain(WeightDesc(s, Memory::format_tag::ba), state_->engine);
  Fill(plain, s.type, 2);
  for (int64_t i = 0; i < s.num_weights; ++i) {
    Memory& packed = state_->weights.emplace_back(primitive.weights_desc(), state_->engine);
    if (i == 0) {
      dnnl::reorder(plain, packed).execute(state_->stream, plain, packed);
      state_->stream.wait();
    } else {
      std::memcpy(packed.get_data_handle(), state_->weights[0].get_data_handle(),
                  packed.get_desc().get_size());
    }
  }
}

OneDnnMatmul::~OneDnnMatmul() = default;

void OneDnnMatmul::StopThreads() { StopOpenMpThreads(); }

void OneDnnMatmul::Run(int64_t weight) {
  state_->matmul.execute(state_->stream,
                         {{DNNL_ARG_SRC, state_->x},
                          {DNNL_ARG_WEIGHTS, state_->weights[static_cast<size_t>(weight)]},
                          {DNNL_ARG_DST, state_->out}});
  state_->stream.wait();
}

}  // namespace switchyard
