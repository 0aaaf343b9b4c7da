// Rows into the form that the tiles read.
#include "kernels/cpu/row_packing.h"

namespace switchyard::SY_CPU_PATH {
namespace {

template <typename T>
void WidenRows(const T* x, int64_t ld, int64_t rows, int64_t k, float* out) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t r = 0; r < rows; ++r) *out++ = ScalarAs(x[r * ld + i]);
}

// For paths with a dot product. Pads k to even with zeros.
[[maybe_unused]] void PackPairs(const uint16_t* x, int64_t ld, int64_t rows, int64_t k,
                                uint32_t* out) {
  for (int64_t i = 0; i < k; i += 2) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t low = x[r * ld + i];
      const uint32_t high = i + 1 < k ? x[r * ld + i + 1] : 0u;
      *out++ = low | high << 16;
    }
  }
}

template <typename T>
void QuantizeRows(const T* x, const cpu::PackRowsItem& item) {
  const QuantizedBlock block(item.out, item.rows, item.k, item.format);
  ActGroup group;
  for (int64_t r = 0; r < item.rows; ++r, x += item.ld) {
    for (int64_t k0 = 0; k0 < item.k; k0 += cpu::kActGroup) {
      F16 v[kVectorsPerActGroup];
      for (int i = 0; i < kVectorsPerActGroup; ++i) {
        const int64_t left = item.k - k0 - i * kLanes;
        v[i] = left <= 0 ? Zero() : LoadSome(x + k0 + i * kLanes, left);
      }
      Quantize(v, &group);
      PlaceGroup(group, block, item.rows, r, k0, item.k, item.format);
    }
  }
}

}  // namespace

size_t PackedRowBytes(int64_t k, WeightFormat format) {
  switch (format.type) {
    case WeightType::kF32:
      return static_cast<size_t>(k) * 4;
    case WeightType::kBF16:
      return static_cast<size_t>(cpu::CeilDiv(k, 2)) * (kHasBf16Dot ? 4 : 8);
    case WeightType::kInt8:
    case WeightType::kInt4:
      break;
  }
  return static_cast<size_t>(NumQuads(k, format) * WordsPerQuad(format) +
                             cpu::CeilDiv(k, cpu::kActGroup) + cpu::CeilDiv(k, format.group)) *
         4;
}

void PackRows(const cpu::PackRowsItem& item) {
  const float* x32 = static_cast<const float*>(item.x);
  const uint16_t* x16 = static_cast<const uint16_t*>(item.x);
  if (IsQuantized(item.format)) {
    if (item.bf16) {
      QuantizeRows(x16, item);
    } else {
      QuantizeRows(x32, item);
    }
    return;
  }
  float* out = static_cast<float*>(item.out);
  if (item.format.type == WeightType::kF32) {
    WidenRows(x32, item.ld, item.rows, item.k, out);
  } else if constexpr (kHasBf16Dot) {
    PackPairs(x16, item.ld, item.rows, item.k, static_cast<uint32_t*>(item.out));
  } else {
    WidenRows(x16, item.ld, item.rows, item.k, out);
    for (int64_t r = 0; item.k % 2 != 0 && r < item.rows; ++r) out[item.k * item.rows + r] = 0.0f;
  }
}

}  // namespace switchyard::SY_CPU_PATH
