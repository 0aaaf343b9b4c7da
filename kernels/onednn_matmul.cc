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

void Fill(const Memory& memory, OneDnnType type, uint64_t seed) {
  std::mt19937_64 random(seed);
  const size_t bytes = memory.get_desc().get_size();
  if (type == OneDnnType::kInt8) {
    uint8_t* p = static_cast<uint8_t*>(memory.get_data_handle());
    for (size_t i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(random() >> 56);
    return;
  }
  bf16* p = static_cast<bf16*>(memory.get_data_handle());
  for (size_t i = 0; i < bytes / 2; ++i)
    p[i] = ToBF16(static_cast<float>(random() >> 40) * 0x1p-23f - 1.0f);
}

}  // namespace

struct OneDnnMatmul::State {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::matmul matmul;
  Memory x, out;
  std::vector<Memory> weights;
};

OneDnnMatmul::OneDnnMatmul(const Shape& s, int num_threads) : state_(std::make_unique<State>()) {
  SetOpenMpThreads(num_threads);
  using Type = Memory::data_type;
  const bool is_bf16 = s.type == OneDnnType::kBF16;
  const auto desc = [](int64_t rows, int64_t columns, Type type, Memory::format_tag tag) {
    return Memory::desc({rows, columns}, type, tag);
  };
  const auto x = desc(s.m, s.k, is_bf16 ? Type::bf16 : Type::u8, Memory::format_tag::ab);
  const auto out = desc(s.m, s.n, Type::f32, Memory::format_tag::ab);
  const Type weight_type = is_bf16 ? Type::bf16 : Type::s8;
  const dnnl::matmul::primitive_desc primitive(
      dnnl::matmul::desc(x, desc(s.k, s.n, weight_type, Memory::format_tag::any), out),
      state_->engine);
  state_->matmul = dnnl::matmul(primitive);
  state_->x = Memory(x, state_->engine);
  state_->out = Memory(out, state_->engine);
  Fill(state_->x, s.type, 1);
  Memory plain(desc(s.k, s.n, weight_type, Memory::format_tag::ba), state_->engine);
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

void OneDnnMatmul::Run(int64_t weight) {
  state_->matmul.execute(state_->stream,
                         {{DNNL_ARG_SRC, state_->x},
                          {DNNL_ARG_WEIGHTS, state_->weights[static_cast<size_t>(weight)]},
                          {DNNL_ARG_DST, state_->out}});
  state_->stream.wait();
}

}  // namespace switchyard
