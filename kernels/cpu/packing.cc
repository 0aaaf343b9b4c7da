#include "kernels/cpu/packing.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/cpu/kernel_table.h"

namespace switchyard::cpu {
namespace {

void PackF32(const float* w, int64_t columns, int64_t k, float* out) {
  for (int64_t i = 0; i < k; ++i, out += kPanelColumns) {
    for (int64_t j = 0; j < kPanelColumns; ++j) out[j] = j < columns ? w[j * k + i] : 0.0f;
  }
}

// A pair of neighbours along k moves as one 32-bit word.
void PackBf16(const bf16* w, int64_t columns, int64_t k, uint32_t* out) {
  static_assert(std::endian::native == std::endian::little);
  for (int64_t i = 0; i < k; i += 2, out += kPanelColumns) {
    const size_t bytes = i + 1 < k ? 4 : 2;
    for (int64_t j = 0; j < kPanelColumns; ++j) {
      out[j] = 0;
      if (j < columns) std::memcpy(&out[j], &w[j * k + i], bytes);
    }
  }
}

}  // namespace

PackedMatrix MakePanels(int64_t n, int64_t k, DType dtype, int64_t num_sources) {
  PackedMatrix packed;
  packed.n = n * num_sources;
  packed.k = k;
  packed.dtype = dtype;
  packed.storage = Buffer(static_cast<size_t>(NumPanels(n) * num_sources) *
                          PanelBytes(k, dtype == DType::kBF16));
  return packed;
}

PackedMatrix PackPanels(ThreadPool* pool, std::span<const Tensor> sources) {
  const Tensor& first = sources.front();
  for (const Tensor& t : sources) {
    SY_CHECK_EQ(t.ndim, 2);
    SY_CHECK(t.dtype == first.dtype && t.dtype != DType::kI32);
    SY_CHECK_EQ(t.dim(0), first.dim(0));
    SY_CHECK_EQ(t.dim(1), first.dim(1));
  }
  const int64_t n = first.dim(0);
  const int64_t k = first.dim(1);
  const bool is_bf16 = first.dtype == DType::kBF16;
  const int64_t num_sources = static_cast<int64_t>(sources.size());
  const int64_t panels = NumPanels(n) * num_sources;
  const size_t panel_bytes = PanelBytes(k, is_bf16);

  PackedMatrix packed = MakePanels(n, k, first.dtype, num_sources);
  pool->ParallelFor(panels, [&](int64_t panel) {
    const Tensor& source = sources[static_cast<size_t>(panel % num_sources)];
    const int64_t column = panel / num_sources * kPanelColumns;
    const int64_t columns = std::min(kPanelColumns, n - column);
    std::byte* out = packed.storage.data() + static_cast<size_t>(panel) * panel_bytes;
    if (is_bf16) {
      PackBf16(source.as<bf16>() + column * k, columns, k, reinterpret_cast<uint32_t*>(out));
    } else {
      PackF32(source.as<float>() + column * k, columns, k, reinterpret_cast<float*>(out));
    }
  });
  return packed;
}

}  // namespace switchyard::cpu
