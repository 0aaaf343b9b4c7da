// F16 on AVX-512 (F, BW, VL, DQ) with BF16 and VNNI dot products. Included by simd.h only.
#pragma once

#include <immintrin.h>

namespace switchyard::SY_CPU_PATH {

struct F16 {
  __m512 v;
};

SY_INLINE F16 Splat(float v) { return {_mm512_set1_ps(v)}; }
SY_INLINE F16 Zero() { return {_mm512_setzero_ps()}; }
SY_INLINE F16 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
SY_INLINE void Store(float* p, F16 v) { _mm512_storeu_ps(p, v.v); }
SY_INLINE F16 Add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
SY_INLINE F16 Sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
SY_INLINE F16 Mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
SY_INLINE F16 Div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c
SY_INLINE F16 Fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN.
SY_INLINE F16 Max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
SY_INLINE F16 Min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
// c > d ? a : b in every lane
SY_INLINE F16 SelectGreater(F16 c, F16 d, F16 a, F16 b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(c.v, d.v, _CMP_GT_OQ), b.v, a.v)};
}
SY_INLINE F16 Neg(F16 a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
// To the nearest integer, ties to even.
SY_INLINE F16 Round(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n.
SY_INLINE F16 ScaleByPowerOfTwo(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

SY_INLINE F16 LoadBf16(const uint16_t* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// Round to nearest even; NaN stays NaN.
SY_INLINE void StoreBf16(uint16_t* p, F16 v) {
  const __m512i u = _mm512_castps_si512(v.v);
  const __m512i top = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_or_epi32(r, nan, top, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}

// One k-pair of a bfloat16 panel: [16][2].
constexpr bool kHasBf16Dot = true;
// acc[j] + x[0] * w[j][0] + x[1] * w[j][1]; `pair` holds the two bfloat16 of a row.
SY_INLINE F16 DotPair(F16 acc, __m512i w, uint32_t pair) {
  const __m512i x = _mm512_set1_epi32(static_cast<int>(pair));
#if defined(__clang__)  // clang 16 crashes on the intrinsic with a broadcast operand
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(w), "v"(x));
  return acc;
#else
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x))};
#endif
}
SY_INLINE __m512i LoadPair(const uint16_t* p) { return _mm512_loadu_si512(p); }

// Quantised products. Codes: 4 inputs of 16 columns, unsigned bytes.
struct Codes {
  __m512i v;
};
SY_INLINE Codes LoadCodes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
SY_INLINE Codes LowHalves(Codes c) { return {_mm512_and_si512(c.v, _mm512_set1_epi8(15))}; }
SY_INLINE Codes HighHalves(Codes c) {
  return {_mm512_and_si512(_mm512_srli_epi16(c.v, 4), _mm512_set1_epi8(15))};
}
// Exact sums of codes times the signed bytes of a row, 16 columns at once.
using Dots8 = __m512i;
using Dots4 = __m512i;
constexpr int kWordsPerQuad8 = 1;  // 32-bit words that hold 4 inputs of a row
using RowQuad = __m512i;
SY_INLINE RowQuad LoadQuad(const uint32_t* x) { return _mm512_set1_epi32(static_cast<int>(*x)); }
SY_INLINE Dots8 StartDots8(int32_t start) { return _mm512_set1_epi32(start); }
SY_INLINE Dots8 AddDots8(Dots8 d, Codes c, RowQuad x) {
  asm("vpdpbusd %2, %1, %0"
      : "+v"(d)
      : "v"(c.v), "v"(x));  // GCC 12 copies sums around the intrinsic
  return d;
}
SY_INLINE F16 EndDots8(Dots8 d) { return {_mm512_cvtepi32_ps(d)}; }
SY_INLINE Dots4 StartDots4(int32_t start) { return StartDots8(start); }
SY_INLINE Dots4 FoldDots4(Dots4 d) { return d; }
SY_INLINE F16 EndDots4(Dots4 d) { return EndDots8(d); }

// 16 float16, 16 unsigned bytes.
SY_INLINE F16 LoadHalf(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
SY_INLINE F16 LoadBytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
// Integral values in [-128, 127].
SY_INLINE void StoreInt8(int8_t* p, F16 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.v)));
}

// Into the L2 cache.
SY_INLINE void Prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Register tiles of the matrix product: up to kMaxRows rows (kMaxQuantizedRows of quantised
// weights, whose sums are three: of codes, of a group, of the output); PanelsFor(rows) panels at
// once.
constexpr int kMaxRows = 12;
constexpr int kMaxQuantizedRows = 8;
constexpr int PanelsFor(int rows) { return rows <= 4 ? 4 : 2; }

}  // namespace switchyard::SY_CPU_PATH
