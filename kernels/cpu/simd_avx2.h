// F16 on AVX2 with FMA and F16C: two 256-bit halves. Included by simd.h only.
#pragma once

#include <immintrin.h>

namespace switchyard::SY_CPU_PATH {

struct F16 {
  __m256 lo, hi;
};

SY_INLINE F16 Splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
SY_INLINE F16 Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SY_INLINE F16 Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SY_INLINE void Store(float* p, F16 v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
SY_INLINE F16 Add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
SY_INLINE F16 Sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
SY_INLINE F16 Mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
SY_INLINE F16 Div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
// a * b + c
SY_INLINE F16 Fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// The second operand where either is NaN.
SY_INLINE F16 Max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
SY_INLINE F16 Min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
// c > d ? a : b in every lane
SY_INLINE F16 SelectGreater(F16 c, F16 d, F16 a, F16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(c.lo, d.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(c.hi, d.hi, _CMP_GT_OQ))};
}
SY_INLINE F16 Neg(F16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}
// To the nearest integer, ties to even.
SY_INLINE F16 Round(F16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
SY_INLINE __m256 ScaleHalf(__m256 a, __m256 n) {
  const __m256i e = _mm256_cvtps_epi32(n);
  const __m256i e1 = _mm256_srai_epi32(e, 1);
  const __m256i e2 = _mm256_sub_epi32(e, e1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 s1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e1, bias), 23));
  const __m256 s2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e2, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a, s1), s2);
}
// a * 2^n for integral n in [-200, 200], in two exact steps.
SY_INLINE F16 ScaleByPowerOfTwo(F16 a, F16 n) {
  return {ScaleHalf(a.lo, n.lo), ScaleHalf(a.hi, n.hi)};
}

SY_INLINE __m256 WidenHalf(__m128i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
SY_INLINE F16 LoadBf16(const uint16_t* p) {
  return {WidenHalf(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          WidenHalf(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
// Round to nearest even; NaN stays NaN.
SY_INLINE __m256i NarrowHalf(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(r, nan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
SY_INLINE void StoreBf16(uint16_t* p, F16 v) {
  const __m256i packed = _mm256_packus_epi32(NarrowHalf(v.lo), NarrowHalf(v.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

// One k-pair of a bfloat16 panel: [16][2].
constexpr bool kHasBf16Dot = false;
SY_INLINE F16 LoadPairEven(const uint16_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q + 1), 16))};
}
// The mask is read from memory each time: held in a register it would push a tile's partial sum out
// to the stack.
alignas(32) inline constexpr uint32_t kOddMask[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                     0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                     0xffff0000u, 0xffff0000u};
SY_INLINE F16 LoadPairOdd(const uint16_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  const uint32_t* mask = kOddMask;
  asm("" : "+r"(mask));
  const __m256i m = _mm256_load_si256(reinterpret_cast<const __m256i*>(mask));
  return {_mm256_castsi256_ps(_mm256_and_si256(m, _mm256_loadu_si256(q))),
          _mm256_castsi256_ps(_mm256_and_si256(m, _mm256_loadu_si256(q + 1)))};
}

// Quantised products: exact sums of codes times the signed bytes of a row, 8 columns at once. 32
// bytes of codes, as two operands; what fills them is read from memory each time, as above.
struct CodePairs {
  __m256i a, b;
};
alignas(32) inline constexpr uint16_t kLowBytes[16] = {255, 255, 255, 255, 255, 255, 255, 255,
                                                       255, 255, 255, 255, 255, 255, 255, 255};
alignas(32) inline constexpr uint16_t kLowNibbles[16] = {
    0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f,
    0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f, 0x0f0f};
SY_INLINE __m256i Masked(__m256i v, const uint16_t* mask) {
  asm("" : "+r"(mask));
  return _mm256_and_si256(v, _mm256_load_si256(reinterpret_cast<const __m256i*>(mask)));
}
// 8-bit codes: products of 16-bit numbers, as maddubs would saturate; a row's 4 inputs are two
// words (0, 2), (1, 3).
constexpr int kWordsPerQuad8 = 2;
struct Dots8 {
  __m256i half[2];
};
SY_INLINE Dots8 StartDots8(int32_t start) {
  return {{_mm256_set1_epi32(start), _mm256_set1_epi32(start)}};
}
SY_INLINE CodePairs LoadPairs8(const uint8_t* p) {
  const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {Masked(c, kLowBytes), _mm256_srli_epi16(c, 8)};
}
// By hand: 12 sums, the codes and two more registers are all there are, and GCC 12 spills sums.
SY_INLINE void AddPairs8(__m256i* sum, CodePairs c, const uint32_t& x02, const uint32_t& x13) {
  __m256i t, u;
  asm("vpbroadcastd %3, %1\n\t"
      "vpbroadcastd %4, %2\n\t"
      "vpmaddwd %5, %1, %1\n\t"
      "vpmaddwd %6, %2, %2\n\t"
      "vpaddd %2, %1, %1\n\t"
      "vpaddd %1, %0, %0"
      : "+x"(*sum), "=&x"(t), "=&x"(u)
      : "m"(x02), "m"(x13), "x"(c.a), "x"(c.b));
}
SY_INLINE F16 EndDots8(Dots8 d) {
  return {_mm256_cvtepi32_ps(d.half[0]), _mm256_cvtepi32_ps(d.half[1])};
}
// 4-bit codes: pairs fit 16 bits up to 32 inputs (8 * 2 * 15 * 127 = 30480), then they are folded.
struct Dots4 {
  Dots8 sum;
  __m256i half[2];
};
SY_INLINE Dots4 StartDots4(int32_t start) {
  return {StartDots8(start), {_mm256_setzero_si256(), _mm256_setzero_si256()}};
}
SY_INLINE CodePairs LoadPairs4(const uint8_t* p) {
  const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {Masked(c, kLowNibbles), Masked(_mm256_srli_epi16(c, 4), kLowNibbles)};
}
SY_INLINE void AddPairs4(__m256i* sum, CodePairs c, const uint32_t& low, const uint32_t& high) {
  __m256i t, u;
  asm("vpbroadcastd %3, %1\n\t"
      "vpbroadcastd %4, %2\n\t"
      "vpmaddubsw %1, %5, %1\n\t"
      "vpmaddubsw %2, %6, %2\n\t"
      "vpaddw %2, %1, %1\n\t"
      "vpaddw %1, %0, %0"
      : "+x"(*sum), "=&x"(t), "=&x"(u)
      : "m"(low), "m"(high), "x"(c.a), "x"(c.b));
}
SY_INLINE Dots4 FoldDots4(Dots4 d) {
  const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
  return {{{_mm256_add_epi32(d.sum.half[0], _mm256_madd_epi16(d.half[0], ones)),
            _mm256_add_epi32(d.sum.half[1], _mm256_madd_epi16(d.half[1], ones))}},
          {zero, zero}};
}
SY_INLINE F16 EndDots4(Dots4 d) { return EndDots8(d.sum); }

// 16 float16, 16 unsigned bytes.
SY_INLINE F16 LoadHalf(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
SY_INLINE F16 LoadBytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
// Integral values in [-128, 127].
SY_INLINE void StoreInt8(int8_t* p, F16 v) {
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)), 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// Into the L2 cache.
SY_INLINE void Prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Register tiles of the matrix product: up to kMaxRows rows; PanelsFor(rows) panels at once.
constexpr int kMaxRows = 6;
constexpr int kMaxQuantizedRows = 6;
constexpr int PanelsFor(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

}  // namespace switchyard::SY_CPU_PATH
