// simd.h: where instruction sets differ, besides some steps in matmul_tiles.h. F16 is a vector of
// 16 float32 lanes; everything else in cpu/ is the same text for every path and is compiled once
// per path, in the namespace SY_CPU_PATH (a compile definition).
//
// Files compiled per path include no standard header with inline functions: the linker would keep
// one copy, perhaps with instructions that this CPU lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef SY_CPU_PATH
#error "compile through kernels/CMakeLists.txt, which names the path"
#endif

#define SY_INLINE inline __attribute__((always_inline))
// Before loops over rows and panels of a tile: unrolled early enough that sums stay in registers.
#if defined(__clang__)
#define SY_UNROLL _Pragma("unroll")
#else
#define SY_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(SY_CPU_AVX512)
#include "kernels/cpu/simd_avx512.h"
#elif defined(SY_CPU_AVX2)
#include "kernels/cpu/simd_avx2.h"
#else
#include "kernels/cpu/simd_portable.h"
#endif

namespace switchyard::SY_CPU_PATH {

constexpr int kLanes = 16;

// Storage <-> float32 by element type: float or uint16_t (bfloat16 bits).
SY_INLINE F16 LoadAs(const float* p) { return Load(p); }
SY_INLINE F16 LoadAs(const uint16_t* p) { return LoadBf16(p); }
SY_INLINE void StoreAs(float* p, F16 v) { Store(p, v); }
SY_INLINE void StoreAs(uint16_t* p, F16 v) { StoreBf16(p, v); }

// The first `count` (0..16) lanes; the others load as zero and are not stored. Never touches memory
// past them.
template <typename T>
SY_INLINE F16 LoadSome(const T* p, int64_t count) {
  if (count >= kLanes) return LoadAs(p);
  alignas(64) T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return LoadAs(lanes);
}
template <typename T>
SY_INLINE void StoreSome(T* p, F16 v, int64_t count) {
  if (count >= kLanes) return StoreAs(p, v);
  alignas(64) T lanes[kLanes];
  StoreAs(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// The one reduction tree: lanes i and i+8, then +4, +2, +1.
typedef float Quarter __attribute__((vector_size(16), may_alias));
template <typename Fn>
SY_INLINE float Reduce(F16 v, const Fn& fn) {
  alignas(64) float lanes[kLanes];
  Store(lanes, v);
  const Quarter* a = reinterpret_cast<const Quarter*>(lanes);
  const Quarter b = fn(fn(a[0], a[2]), fn(a[1], a[3]));
  const float b0 = b[0], b1 = b[1], b2 = b[2], b3 = b[3];
  return fn(fn(b0, b2), fn(b1, b3));
}
SY_INLINE float ReduceSum(F16 v) {
  return Reduce(v, [](const auto& a, const auto& b) { return a + b; });
}
SY_INLINE float ReduceMax(F16 v) {
  return Reduce(v, [](const auto& a, const auto& b) { return b > a ? b : a; });
}

// poison + 0 where x is finite or -inf, a legal logit (of a token that cannot come); NaN elsewhere.
// 0 * x is 0 for finite numbers only, so -inf is lifted to the lowest one.
SY_INLINE F16 AddPoison(F16 x, F16 poison) {
  return Fma(Max(Splat(-3.4028234663852886e38f), x), Zero(), poison);
}

// e^x to about 1 ulp. Exactly 0 below -104, infinity above 89, NaN stays NaN. Cody-Waite reduction
// with a degree-6 polynomial (the coefficients of Cephes' expf).
SY_INLINE F16 Exp(F16 x) {
  x = Max(Splat(-110.0f), Min(Splat(110.0f), x));  // the second operand passes when it is NaN
  const F16 n = Round(Mul(x, Splat(1.44269504088896341f)));
  F16 r = Fma(n, Splat(-0.693359375f), x);
  r = Fma(n, Splat(2.12194440e-4f), r);
  F16 p = Splat(1.9875691500e-4f);
  p = Fma(p, r, Splat(1.3981999507e-3f));
  p = Fma(p, r, Splat(8.3334519073e-3f));
  p = Fma(p, r, Splat(4.1665795894e-2f));
  p = Fma(p, r, Splat(1.6666665459e-1f));
  p = Fma(p, r, Splat(5.0000001201e-1f));
  p = Fma(Mul(r, r), p, Add(r, Splat(1.0f)));
  return ScaleByPowerOfTwo(p, n);
}

SY_INLINE F16 SigmoidOf(F16 x) { return Div(Splat(1.0f), Add(Splat(1.0f), Exp(Neg(x)))); }
// x * sigmoid(x)
SY_INLINE F16 SiluOf(F16 x) { return Div(x, Add(Splat(1.0f), Exp(Neg(x)))); }

}  // namespace switchyard::SY_CPU_PATH
