// Rows into the form that the tiles read.
#include "kernels/cpu/row_packing.h"

namespace switchyard::SY_CPU_PATH {
namespace {

template <typename T>
void QuantizeRows(const T* x, const cpu::PackRowsItem& item) {
  const QuantizedBlock block(item.out, item.rows, item.k, item.format);
  for (int64_t k0 = 0; k0 < item.k; k0 += cpu::kActGroup) {
    PlaceGroups(block, item.rows, k0, item.k, item.format, [&](int64_t r, ActGroup* group) {
      F16 v[kVectorsPerActGroup];
      for (int i = 0; i < kVectorsPerActGroup; ++i) {
        const int64_t left = item.k - k0 - i * kLanes;
        v[i] = left <= 0 ? Zero() : LoadSome(x + r * item.ld + k0 + i * kLanes, left);
      }
      Quantize(v, group);
    });
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
  uint32_t* out = static_cast<uint32_t*>(item.out);
  if (item.format.type == WeightType::kF32) {
    Interleave<4>(item.x, item.ld * 4, item.rows, item.k, out);
    return;
  }
  // Pairs of bfloat16, or both widened. An odd k is padded with zero.
  constexpr int kWordBytes = kHasBf16Dot ? 4 : 2;
  const int64_t words = kHasBf16Dot ? item.k / 2 : item.k;
  Interleave<kWordBytes>(item.x, item.ld * 2, item.rows, words, out);
  if (item.k % 2 == 0) return;
  out += words * item.rows;
  for (int64_t r = 0; r < item.rows; ++r) out[r] = kHasBf16Dot ? x16[r * item.ld + item.k - 1] : 0u;
}

}  // namespace switchyard::SY_CPU_PATH
