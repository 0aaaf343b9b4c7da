// Rows as the tiles of a matrix product read them; one block of R rows at a time, row_bytes each:
//   kF32, kBF16  [k or pairs of k][R] (row_packing.cc)
//   quantised    codes [quads of k][words per quad][R], then scales [ceil(k / 128)][R] float32,
//   then
//                for every group of weights the row's sum of codes, [ceil(k / group)][R]: int32
//                times minus the fixed zero point, or float32 where the zero points vary
// A row is quantised from itself alone: in each group of 128 inputs, scale = max |x| / 127 and code
// = round(x * (127 / max)), ties to even. A NaN or infinity makes the group's scale NaN.
#pragma once

#include "kernels/cpu/interleave.h"
#include "kernels/cpu/kernels.h"

namespace switchyard::SY_CPU_PATH {

static_assert(cpu::kMaxBlockRows <= kMaxInterleaved);
constexpr int kVectorsPerActGroup = cpu::kActGroup / kLanes;
constexpr int64_t kQuadsPerActGroup = cpu::kActGroup / 4;

SY_INLINE constexpr int64_t WordsPerQuad(WeightFormat f) {
  return f.type == WeightType::kInt8 ? kWordsPerQuad8 : 1;
}
// Quads of inputs of one row: 4-bit codes of weights come eight inputs at a time.
SY_INLINE constexpr int64_t NumQuads(int64_t k, WeightFormat f) {
  return f.type == WeightType::kInt8 ? cpu::CeilDiv(k, 4) : cpu::CeilDiv(k, 8) * 2;
}

// The parts of a packed block.
struct QuantizedBlock {
  SY_INLINE QuantizedBlock(void* block, int64_t rows, int64_t k, WeightFormat f)
      : words(static_cast<uint32_t*>(block)),
        scales(reinterpret_cast<float*>(words + NumQuads(k, f) * WordsPerQuad(f) * rows)),
        sums(reinterpret_cast<int32_t*>(scales + cpu::CeilDiv(k, cpu::kActGroup) * rows)) {}
  uint32_t* words;
  float* scales;
  int32_t* sums;
};

// One row's group of 128 inputs, zeros after the first `count`.
struct ActGroup {
  alignas(64) int8_t codes[cpu::kActGroup];
  float scale;
};
SY_INLINE void Quantize(const F16 (&x)[kVectorsPerActGroup], ActGroup* out) {
  F16 max = Zero(), poison = Zero();
  for (const F16& v : x) {
    max = Max(Max(v, Neg(v)), max);  // the second operand where the first is NaN
    poison = Fma(v, Zero(), poison);
  }
  const float m = ReduceMax(max);
  const bool finite = ReduceSum(poison) == 0.0f;
  const float inverse = finite && m > 0x1p-100f ? 127.0f / m : 0.0f;
  for (int i = 0; i < kVectorsPerActGroup; ++i)
    StoreInt8(out->codes + i * kLanes, finite ? Round(Mul(x[i], Splat(inverse))) : Zero());
  out->scale = !finite ? __builtin_nanf("") : inverse == 0.0f ? 0.0f : m / 127.0f;
}

// Two words per quad: its inputs 0 and 2, then 1 and 3, as 16-bit numbers.
SY_INLINE void WidenCodes(const ActGroup& group, uint32_t* words) {
  typedef int16_t Shorts16 __attribute__((vector_size(32), may_alias));
  for (int64_t q = 0; q < kQuadsPerActGroup; q += 8, words += 16) {
    const Shorts16 codes = *reinterpret_cast<const Shorts16*>(group.codes + 4 * q);
    const Words8 even = reinterpret_cast<Words8>((codes << 8) >> 8);
    const Words8 odd = reinterpret_cast<Words8>(codes >> 8);
    StoreWords(__builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11), words);
    StoreWords(__builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15), words + 8);
  }
}

// The words of a group's codes, one after the other.
constexpr int64_t kWordsPerActGroup = kQuadsPerActGroup * kWordsPerQuad8;  // at most
SY_INLINE void CodeWords(const ActGroup& group, WeightFormat f, uint32_t* words) {
  __builtin_memcpy(words, group.codes, sizeof(group.codes));
  if constexpr (kWordsPerQuad8 == 2) {
    if (f.type == WeightType::kInt8) WidenCodes(group, words);
  }
}

// The groups of 128 inputs that begin at input k0, of all rows of a block: row r's is made by
// make(r, &group).
template <typename Make>
SY_INLINE void PlaceGroups(const QuantizedBlock& block, int64_t rows, int64_t k0, int64_t k,
                           WeightFormat f, const Make& make) {
  alignas(64) uint32_t words[kMaxInterleaved][kWordsPerActGroup];
  const int32_t zero = f.type == WeightType::kInt8 ? 128 : 8;
  for (int64_t r = 0; r < rows; ++r) {
    ActGroup group;
    make(r, &group);
    CodeWords(group, f, words[r]);
    block.scales[k0 / cpu::kActGroup * rows + r] = group.scale;
    for (int64_t g = k0 / f.group, i = 0; i < cpu::kActGroup && k0 + i < k; ++g, i += f.group) {
      int32_t sum = 0;
      for (int64_t j = 0; j < f.group; ++j) sum += group.codes[i + j];
      if (f.zero_points) {
        const float s = static_cast<float>(sum);
        __builtin_memcpy(&block.sums[g * rows + r], &s, 4);
      } else {
        block.sums[g * rows + r] = -zero * sum;
      }
    }
  }
  const int64_t left = NumQuads(k, f) - k0 / 4;
  const int64_t quads = left < kQuadsPerActGroup ? left : kQuadsPerActGroup;
  Interleave<4>(words, sizeof(words[0]), rows, quads * WordsPerQuad(f),
                block.words + k0 / 4 * rows * WordsPerQuad(f));
}

}  // namespace switchyard::SY_CPU_PATH
