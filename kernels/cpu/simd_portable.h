// F16 on any CPU, in the compiler's vector extension: four vectors of four (SSE2 on x86-64). No
// fused multiply-add. Included by simd.h only.
#pragma once

namespace switchyard::SY_CPU_PATH {

typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));

struct F16 {
  V4 v[4];
};

// Applies `expr` to the four parts.
#define SY_PARTS(expr)                       \
  F16 r;                                     \
  for (int i = 0; i < 4; ++i) r.v[i] = expr; \
  return r

SY_INLINE V4 Splat4(float v) { return V4{v, v, v, v}; }
SY_INLINE F16 Splat(float v) { SY_PARTS(Splat4(v)); }
SY_INLINE F16 Zero() { SY_PARTS(V4{}); }
SY_INLINE F16 Load(const float* p) {
  F16 r;
  __builtin_memcpy(&r, p, sizeof(r));
  return r;
}
SY_INLINE void Store(float* p, F16 v) { __builtin_memcpy(p, &v, sizeof(v)); }
SY_INLINE F16 Add(F16 a, F16 b) { SY_PARTS(a.v[i] + b.v[i]); }
SY_INLINE F16 Sub(F16 a, F16 b) { SY_PARTS(a.v[i] - b.v[i]); }
SY_INLINE F16 Mul(F16 a, F16 b) { SY_PARTS(a.v[i] * b.v[i]); }
SY_INLINE F16 Div(F16 a, F16 b) { SY_PARTS(a.v[i] / b.v[i]); }
// a * b + c
SY_INLINE F16 Fma(F16 a, F16 b, F16 c) { SY_PARTS(a.v[i] * b.v[i] + c.v[i]); }
SY_INLINE V4 Select4(I4 mask, V4 a, V4 b) { return (V4)(((I4)a & mask) | ((I4)b & ~mask)); }
// The second operand where either is NaN.
SY_INLINE F16 Max(F16 a, F16 b) { SY_PARTS(Select4(a.v[i] > b.v[i], a.v[i], b.v[i])); }
SY_INLINE F16 Min(F16 a, F16 b) { SY_PARTS(Select4(a.v[i] < b.v[i], a.v[i], b.v[i])); }
// c > d ? a : b in every lane
SY_INLINE F16 SelectGreater(F16 c, F16 d, F16 a, F16 b) {
  SY_PARTS(Select4(c.v[i] > d.v[i], a.v[i], b.v[i]));
}
SY_INLINE F16 Neg(F16 a) { SY_PARTS((V4)((U4)a.v[i] ^ 0x80000000u)); }
// To the nearest integer, ties to even. REQUIRES: |a| < 2^22 (or NaN).
SY_INLINE F16 Round(F16 a) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  SY_PARTS((a.v[i] + magic) - magic);
}
// a * 2^n for integral n in [-200, 200], in two exact steps.
SY_INLINE F16 ScaleByPowerOfTwo(F16 a, F16 n) {
  F16 r;
  for (int i = 0; i < 4; ++i) {
    const I4 finite = n.v[i] == n.v[i];
    const I4 e = __builtin_convertvector(Select4(finite, n.v[i], V4{}), I4);
    const I4 e1 = e >> 1;
    const I4 e2 = e - e1;
    r.v[i] = a.v[i] * (V4)((e1 + 127) << 23) * (V4)((e2 + 127) << 23);
  }
  return r;
}

SY_INLINE F16 LoadBf16(const uint16_t* p) {
  F16 r;
  for (int i = 0; i < 4; ++i)
    r.v[i] = (V4)(U4{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]} << 16);
  return r;
}
// Round to nearest even; NaN stays NaN.
SY_INLINE void StoreBf16(uint16_t* p, F16 v) {
  for (int i = 0; i < 4; ++i) {
    const U4 u = (U4)v.v[i];
    const U4 rounded = (u + ((u >> 16) & 1u) + 0x7fffu) >> 16;
    const U4 nan = (U4)(v.v[i] != v.v[i]);
    const U4 out = (rounded & ~nan) | (((u >> 16) | 0x40u) & nan);
    for (int j = 0; j < 4; ++j) p[4 * i + j] = static_cast<uint16_t>(out[j]);
  }
}

// One k-pair of a bfloat16 panel: [16][2].
constexpr bool kHasBf16Dot = false;
SY_INLINE F16 LoadPairEven(const uint16_t* p) {
  U4 u[4];
  __builtin_memcpy(u, p, sizeof(u));
  SY_PARTS((V4)(u[i] << 16));
}
SY_INLINE F16 LoadPairOdd(const uint16_t* p) {
  U4 u[4];
  __builtin_memcpy(u, p, sizeof(u));
  SY_PARTS((V4)(u[i] & 0xffff0000u));
}

// Quantised products. Codes: 4 inputs of 16 columns, unsigned bytes.
struct Codes {
  U4 v[4];
};
SY_INLINE Codes LoadCodes(const uint8_t* p) {
  Codes c;
  __builtin_memcpy(&c, p, sizeof(c));
  return c;
}
SY_INLINE Codes LowHalves(Codes c) {
  for (U4& v : c.v) v = v & 0x0f0f0f0fu;
  return c;
}
SY_INLINE Codes HighHalves(Codes c) {
  for (U4& v : c.v) v = v >> 4 & 0x0f0f0f0fu;
  return c;
}
// Exact sums of codes times the signed bytes of a row, 16 columns at once: integers below 2^24 in
// float32.
using Dots8 = F16;
using Dots4 = F16;
constexpr int kWordsPerQuad8 = 1;
SY_INLINE Dots8 StartDots8(int32_t start) { return Splat(static_cast<float>(start)); }
struct RowQuad {
  float v[4];
};
SY_INLINE RowQuad LoadQuad(const uint32_t* x) {
  RowQuad q;
  for (int byte = 0; byte < 4; ++byte)
    q.v[byte] = static_cast<float>(static_cast<int8_t>(*x >> 8 * byte));
  return q;
}
SY_INLINE Dots8 AddDots8(Dots8 d, Codes c, RowQuad x) {
  for (int byte = 0; byte < 4; ++byte)
    for (int i = 0; i < 4; ++i)
      d.v[i] += __builtin_convertvector((I4)(c.v[i] >> 8 * byte & 255u), V4) * Splat4(x.v[byte]);
  return d;
}
SY_INLINE F16 EndDots8(Dots8 d) { return d; }
SY_INLINE Dots4 StartDots4(int32_t start) { return StartDots8(start); }
SY_INLINE Dots4 FoldDots4(Dots4 d) { return d; }
SY_INLINE F16 EndDots4(Dots4 d) { return d; }

// 16 float16 (small ones by their integer, so that flush-to-zero cannot touch them), 16 bytes.
SY_INLINE float FloatFromHalf(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  union {
    uint32_t u;
    float f;
  } v;
  if (exponent == 0) {
    v.f = static_cast<float>(mantissa) * 0x1p-24f;
  } else {
    v.u = (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
  }
  v.u |= sign;
  return v.f;
}
SY_INLINE F16 LoadHalf(const uint16_t* p) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i / 4][i % 4] = FloatFromHalf(p[i]);
  return r;
}
SY_INLINE F16 LoadBytes(const uint8_t* p) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i / 4][i % 4] = static_cast<float>(p[i]);
  return r;
}
// Integral values in [-128, 127].
SY_INLINE void StoreInt8(int8_t* p, F16 v) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(v.v[i / 4][i % 4]);
}
#undef SY_PARTS
// Into the L2 cache.
SY_INLINE void Prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Register tiles of the matrix product: up to kMaxRows rows; PanelsFor(rows) panels at once.
constexpr int kMaxRows = 2;
constexpr int kMaxQuantizedRows = 2;
constexpr int PanelsFor(int rows) { return rows == 1 ? 2 : 1; }

}  // namespace switchyard::SY_CPU_PATH
