// Register tiles of the matrix product: R rows x P panels, one sequential accumulation along k for
// every output, whatever R and P. FindTile gives the tile of a weight format. Partial sums that are
// put down between K blocks are float32, as in the registers. Included by matmul_kernel.cc only.
#pragma once

#include "kernels/cpu/row_packing.h"

namespace switchyard::SY_CPU_PATH {

constexpr int64_t kPrefetchBytes = 1024;

// One block of rows and some panels over a stretch of k, in steps: one input (kF32), a pair (kBF16)
// or kActGroup of them (quantised).
struct TileArgs {
  const void* x;       // the packed block's words at the first step
  const std::byte* w;  // the first panel's numbers or codes at the first step
  size_t panel_bytes;  // from panel to panel
  int64_t num_steps;
  float* sums;           // [panel][row][16]
  int64_t panel_stride;  // floats between panels of `sums`
  bool first;            // start from zero
  // Quantised only.
  const float* x_scales;    // [step][rows]
  const int32_t* x_sums;    // [group of weights][rows]
  const std::byte* scales;  // the first panel's, at the first step
  const std::byte* zeros;   // the first panel's, at the first step
  int64_t num_k;            // inputs: the last step may have fewer than kActGroup
};
using TileFn = void (*)(const TileArgs&);

template <int R, int P>
SY_INLINE void LoadSums(const TileArgs& a, F16 (&acc)[R][P]) {
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p)
      acc[r][p] = a.first ? Zero() : Load(a.sums + p * a.panel_stride + r * kLanes);
}
template <int R, int P>
SY_INLINE void StoreSums(const TileArgs& a, const F16 (&acc)[R][P]) {
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) Store(a.sums + p * a.panel_stride + r * kLanes, acc[r][p]);
}

template <int R, int P>
void TileF32(const TileArgs& a) {
  F16 acc[R][P];
  LoadSums<R, P>(a, acc);
  const float* x = static_cast<const float*>(a.x);
  const float* w = reinterpret_cast<const float*>(a.w);
  const size_t stride = a.panel_bytes / sizeof(float);
  for (int64_t k = 0; k < a.num_steps; ++k, x += R, w += kLanes) {
    for (int p = 0; p < P; ++p) {
      Prefetch(reinterpret_cast<const std::byte*>(w + static_cast<size_t>(p) * stride) +
               kPrefetchBytes);
      const F16 wv = Load(w + static_cast<size_t>(p) * stride);
      for (int r = 0; r < R; ++r) acc[r][p] = Fma(Splat(x[r]), wv, acc[r][p]);
    }
  }
  StoreSums<R, P>(a, acc);
}

template <int R, int P>
void TileBf16(const TileArgs& a) {
  F16 acc[R][P];
  LoadSums<R, P>(a, acc);
  const uint16_t* w = reinterpret_cast<const uint16_t*>(a.w);
  const size_t stride = a.panel_bytes / sizeof(uint16_t);
#if defined(SY_CPU_AVX512)
  const uint32_t* x = static_cast<const uint32_t*>(a.x);
  for (int64_t k = 0; k < a.num_steps; ++k, x += R, w += 2 * kLanes) {
    for (int p = 0; p < P; ++p) {
      Prefetch(reinterpret_cast<const std::byte*>(w + static_cast<size_t>(p) * stride) +
               kPrefetchBytes);
      const auto wv = LoadPair(w + static_cast<size_t>(p) * stride);
      for (int r = 0; r < R; ++r) acc[r][p] = DotPair(acc[r][p], wv, x[r]);
    }
  }
#else
  const float* x = static_cast<const float*>(a.x);
  for (int64_t k = 0; k < a.num_steps; ++k, x += 2 * R, w += 2 * kLanes) {
    for (int p = 0; p < P; ++p) {
      Prefetch(reinterpret_cast<const std::byte*>(w + static_cast<size_t>(p) * stride) +
               kPrefetchBytes);
      const F16 even = LoadPairEven(w + static_cast<size_t>(p) * stride);
      for (int r = 0; r < R; ++r) acc[r][p] = Fma(Splat(x[r]), even, acc[r][p]);
      const F16 odd = LoadPairOdd(w + static_cast<size_t>(p) * stride);
      for (int r = 0; r < R; ++r) acc[r][p] = Fma(Splat(x[R + r]), odd, acc[r][p]);
    }
  }
#endif
  StoreSums<R, P>(a, acc);
}

// What one group of weights adds, in float32: exact sums of codes, then scaled.
//   part[r][p] += scale[p] * (dot - zero * sum of the row's codes)
// The fixed zero point is in the value that the integer sums start from.
template <int R, int P>
struct GroupArgs {
  const uint32_t* x;
  const uint8_t* codes;
  size_t panel_bytes;
  int64_t num_k;
  const int32_t* x_sums;    // [rows]
  const std::byte* scales;  // the first panel's
  const std::byte* zeros;
};
template <bool kZeros, int R, int P>
SY_INLINE int32_t StartOf(const GroupArgs<R, P>& g, int r) {
  return kZeros ? 0 : g.x_sums[r];
}
template <bool kZeros, int R, int P>
SY_INLINE void AddScaled(const GroupArgs<R, P>& g, const F16 (&dots)[R][P], F16 (&part)[R][P]) {
  for (int p = 0; p < P; ++p) {
    const size_t offset = static_cast<size_t>(p) * g.panel_bytes;
    const F16 scale = LoadHalf(reinterpret_cast<const uint16_t*>(g.scales + offset));
    for (int r = 0; r < R; ++r) part[r][p] = Fma(dots[r][p], scale, part[r][p]);
    if (!kZeros) continue;
    const F16 zero = LoadBytes(reinterpret_cast<const uint8_t*>(g.zeros + offset));
    const F16 scaled_zero = Neg(Mul(scale, zero));  // exact: 11 and 8 bits
    for (int r = 0; r < R; ++r) {
      float sum;
      __builtin_memcpy(&sum, &g.x_sums[r], 4);
      part[r][p] = Fma(scaled_zero, Splat(sum), part[r][p]);
    }
  }
}

template <bool kZeros, int R, int P>
SY_INLINE void AddGroup8(const GroupArgs<R, P>& g, F16 (&part)[R][P]) {
  Dots8 dots[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) dots[r][p] = StartDots8(StartOf<kZeros>(g, r));
  const uint32_t* x = g.x;
  const uint8_t* c = g.codes;
  for (int64_t k = 0; k < g.num_k; k += 4, x += R * kWordsPerQuad8, c += 64) {
    for (int p = 0; p < P; ++p) {
      const uint8_t* at = c + static_cast<size_t>(p) * g.panel_bytes;
      Prefetch(at + kPrefetchBytes);
      const Codes codes = LoadCodes(at);
      for (int r = 0; r < R; ++r) dots[r][p] = AddDots8(dots[r][p], codes, x + r * kWordsPerQuad8);
    }
  }
  F16 sums[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sums[r][p] = EndDots8(dots[r][p]);
  AddScaled<kZeros, R, P>(g, sums, part);
}

template <bool kZeros, int R, int P>
SY_INLINE void AddGroup4(const GroupArgs<R, P>& g, F16 (&part)[R][P]) {
  constexpr int64_t kFold = 32;
  Dots4 dots[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) dots[r][p] = StartDots4(StartOf<kZeros>(g, r));
  const uint32_t* x = g.x;
  const uint8_t* c = g.codes;
  for (int64_t k0 = 0; k0 < g.num_k; k0 += kFold) {
    const int64_t end = k0 + kFold < g.num_k ? k0 + kFold : g.num_k;
    for (int64_t k = k0; k < end; k += 8, x += 2 * R, c += 64) {
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = c + static_cast<size_t>(p) * g.panel_bytes;
        Prefetch(at + kPrefetchBytes);
        const Codes codes = LoadCodes(at);
        const Codes low = LowHalves(codes), high = HighHalves(codes);
        for (int r = 0; r < R; ++r) {
          dots[r][p] = AddDots4(dots[r][p], low, x + r);
          dots[r][p] = AddDots4(dots[r][p], high, x + R + r);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) dots[r][p] = FoldDots4(dots[r][p]);
  }
  F16 sums[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sums[r][p] = EndDots4(dots[r][p]);
  AddScaled<kZeros, R, P>(g, sums, part);
}

// Every group of 128 inputs: the sum of its groups of weights in ascending order, times the row's
// scale, added to the output's sum.
template <WeightType kType, int kGroup, bool kZeros, int R, int P>
void TileQuantized(const TileArgs& a) {
  constexpr bool k8 = kType == WeightType::kInt8;
  constexpr int64_t kWordsPerGroup = kGroup / 4 * (k8 ? kWordsPerQuad8 : 1) * R;
  constexpr int64_t kBytesPerGroup = kGroup * kLanes / (k8 ? 1 : 2);
  F16 acc[R][P];
  LoadSums<R, P>(a, acc);
  GroupArgs<R, P> g = {.x = static_cast<const uint32_t*>(a.x),
                       .codes = reinterpret_cast<const uint8_t*>(a.w),
                       .panel_bytes = a.panel_bytes,
                       .num_k = kGroup,
                       .x_sums = a.x_sums,
                       .scales = a.scales,
                       .zeros = a.zeros};
  const float* x_scale = a.x_scales;
  for (int64_t k0 = 0; k0 < a.num_k; k0 += cpu::kActGroup, x_scale += R) {
    F16 part[R][P];
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) part[r][p] = Zero();
    for (int64_t k = k0; k < k0 + cpu::kActGroup && k < a.num_k; k += kGroup) {
      if (a.num_k - k < kGroup) g.num_k = a.num_k - k;
      if constexpr (k8) {
        AddGroup8<kZeros, R, P>(g, part);
      } else {
        AddGroup4<kZeros, R, P>(g, part);
      }
      g.x += kWordsPerGroup;
      g.codes += kBytesPerGroup;
      g.x_sums += R;
      g.scales += 2 * kLanes;
      g.zeros += kLanes;
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) acc[r][p] = Fma(part[r][p], Splat(x_scale[r]), acc[r][p]);
  }
  StoreSums<R, P>(a, acc);
}

// The tile of R rows x P panels for the FORMAT-th format (see FormatIndex).
template <int kFormat, int R, int P>
constexpr TileFn TileOrNull() {
  if constexpr (R > kMaxRows || P > PanelsFor(R)) {
    return nullptr;
  } else if constexpr (kFormat == 0) {
    return TileF32<R, P>;
  } else if constexpr (kFormat == 1) {
    return TileBf16<R, P>;
  } else {
    constexpr WeightType kType = kFormat < 6 ? WeightType::kInt8 : WeightType::kInt4;
    return TileQuantized < kType, kFormat % 2 == 1 ? 128 : 32, ((kFormat - 2) & 2) != 0, R, P > ;
  }
}
SY_INLINE int FormatIndex(WeightFormat f) {
  if (!IsQuantized(f)) return f.type == WeightType::kF32 ? 0 : 1;
  return (f.type == WeightType::kInt8 ? 2 : 6) + (f.zero_points ? 2 : 0) + (f.group == 128 ? 1 : 0);
}

// [format][rows - 1][log2(panels)]
#define SY_TILE_ROW(F, R) \
  { TileOrNull<F, R, 1>(), TileOrNull<F, R, 2>(), TileOrNull<F, R, 4>() }
#define SY_TILE_ROWS(F)                                                                            \
  {                                                                                                \
    SY_TILE_ROW(F, 1), SY_TILE_ROW(F, 2), SY_TILE_ROW(F, 3), SY_TILE_ROW(F, 4), SY_TILE_ROW(F, 5), \
        SY_TILE_ROW(F, 6), SY_TILE_ROW(F, 7), SY_TILE_ROW(F, 8)                                    \
  }
constexpr TileFn kTiles[10][8][3] = {
    SY_TILE_ROWS(0), SY_TILE_ROWS(1), SY_TILE_ROWS(2), SY_TILE_ROWS(3), SY_TILE_ROWS(4),
    SY_TILE_ROWS(5), SY_TILE_ROWS(6), SY_TILE_ROWS(7), SY_TILE_ROWS(8), SY_TILE_ROWS(9)};
#undef SY_TILE_ROWS
#undef SY_TILE_ROW

}  // namespace switchyard::SY_CPU_PATH
