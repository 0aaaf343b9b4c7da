// Register tiles of the matrix product: R rows x P panels, one sequential accumulation along k for
// every output, whatever R and P. Partial sums that are put down between K blocks are float32, as
// in the registers. Included by matmul_kernel.cc only.
#pragma once

#include "kernels/cpu/row_packing.h"

namespace switchyard::SY_CPU_PATH {

// One block of rows and some panels of a slab over a stretch of k, in steps: one input (kF32), a
// pair (kBF16), four (kInt8) or eight (kInt4).
struct TileArgs {
  const void* x;          // the packed block's words at the first step
  const std::byte* w;     // the first panel's numbers or codes at the first step
  int64_t step_bytes;     // of the slab
  int64_t num_steps;      // not quantised
  float* sums;            // [panel][row][16]
  int64_t panel_stride;   // floats between panels of `sums`
  bool first;             // start from zero
  const std::byte* next;  // this tile's share of what is read next; whole slabs do not use it
  int64_t next_bytes;     // of it per step
  // Quantised only.
  const float* x_scales;    // [groups of 128][rows]
  const int32_t* x_sums;    // [groups of weights][rows]
  const std::byte* scales;  // the first panel's, of the first group
  const std::byte* zeros;   // the first panel's, of the first group; null without zero points
  int64_t header_bytes;     // of a group of the slab: scales and zero points
  int64_t group;            // inputs that share a scale
  int64_t num_k;            // inputs of the stretch
};
using TileFn = void (*)(const TileArgs&);

// A tile that reads whole slabs prefetches its own stream, another its share of what is read next.
constexpr int64_t kAheadBytes = 4096;
template <int P>
SY_INLINE void PrefetchStep(const void* now, const std::byte* next) {
  const std::byte* ahead =
      P < cpu::kSlabPanels ? next : static_cast<const std::byte*>(now) + kAheadBytes;
  SY_UNROLL for (int p = 0; p < P; ++p) { Prefetch(ahead + p * 64); }
}

template <int R, int P>
SY_INLINE void LoadSums(const TileArgs& a, F16 (&acc)[R][P]) {
  SY_UNROLL for (int r = 0; r < R; ++r) {
    SY_UNROLL for (int p = 0; p < P; ++p) {
      acc[r][p] = a.first ? Zero() : Load(a.sums + p * a.panel_stride + r * kLanes);
    }
  }
}
template <int R, int P>
SY_INLINE void StoreSums(const TileArgs& a, const F16 (&acc)[R][P]) {
  SY_UNROLL for (int r = 0; r < R; ++r) {
    SY_UNROLL for (int p = 0; p < P; ++p) {
      Store(a.sums + p * a.panel_stride + r * kLanes, acc[r][p]);
    }
  }
}

template <int R, int P>
void TileF32(const TileArgs& a) {
  F16 acc[R][P];
  LoadSums<R, P>(a, acc);
  const float* x = static_cast<const float*>(a.x);
  const std::byte* w = a.w;
  const std::byte* next = a.next;
  for (int64_t k = 0; k < a.num_steps; ++k, x += R, w += a.step_bytes, next += a.next_bytes) {
    PrefetchStep<P>(w, next);
    SY_UNROLL for (int p = 0; p < P; ++p) {
      const F16 wv = Load(reinterpret_cast<const float*>(w) + p * kLanes);
      SY_UNROLL for (int r = 0; r < R; ++r) { acc[r][p] = Fma(Splat(x[r]), wv, acc[r][p]); }
    }
  }
  StoreSums<R, P>(a, acc);
}

template <int R, int P>
void TileBf16(const TileArgs& a) {
  F16 acc[R][P];
  LoadSums<R, P>(a, acc);
  const std::byte* w = a.w;
  const std::byte* next = a.next;
#if defined(SY_CPU_AVX512)
  const uint32_t* x = static_cast<const uint32_t*>(a.x);
  for (int64_t k = 0; k < a.num_steps; ++k, x += R, w += a.step_bytes, next += a.next_bytes) {
    PrefetchStep<P>(w, next);
    __m512i wv[P];
    SY_UNROLL for (int p = 0; p < P; ++p) {
      wv[p] = LoadPair(reinterpret_cast<const uint16_t*>(w) + p * 2 * kLanes);
    }
    SY_UNROLL for (int r = 0; r < R; ++r) {
      SY_UNROLL for (int p = 0; p < P; ++p) { acc[r][p] = DotPair(acc[r][p], wv[p], x[r]); }
    }
  }
#else
  const float* x = static_cast<const float*>(a.x);
  for (int64_t k = 0; k < a.num_steps; ++k, x += 2 * R, w += a.step_bytes, next += a.next_bytes) {
    PrefetchStep<P>(w, next);
    SY_UNROLL for (int p = 0; p < P; ++p) {
      const uint16_t* pairs = reinterpret_cast<const uint16_t*>(w) + p * 2 * kLanes;
      const F16 even = LoadPairEven(pairs);
      SY_UNROLL for (int r = 0; r < R; ++r) { acc[r][p] = Fma(Splat(x[r]), even, acc[r][p]); }
      const F16 odd = LoadPairOdd(pairs);
      SY_UNROLL for (int r = 0; r < R; ++r) { acc[r][p] = Fma(Splat(x[R + r]), odd, acc[r][p]); }
    }
  }
#endif
  StoreSums<R, P>(a, acc);
}

// Where a quantised tile is.
struct GroupCursor {
  const uint32_t* x;
  const uint8_t* codes;
  const std::byte* next;
  const int32_t* x_sums;    // [rows]
  const std::byte* scales;  // the first panel's
  const std::byte* zeros;
};
// What one group of weights adds, in float32: exact sums of codes, then scaled.
//   part[r][p] += scale[p] * (dot - zero[p] * sum of the row's codes)
// The fixed zero point is in the value that the integer sums start from.
template <int R, int P>
SY_INLINE void AddScaled(const GroupCursor& g, const F16 (&dots)[R][P], F16 (&part)[R][P]) {
  SY_UNROLL for (int p = 0; p < P; ++p) {
    const F16 scale = LoadHalf(reinterpret_cast<const uint16_t*>(g.scales) + p * kLanes);
    SY_UNROLL for (int r = 0; r < R; ++r) { part[r][p] = Fma(dots[r][p], scale, part[r][p]); }
    if (g.zeros == nullptr) continue;
    const F16 zero = LoadBytes(reinterpret_cast<const uint8_t*>(g.zeros) + p * kLanes);
    const F16 scaled_zero = Neg(Mul(scale, zero));  // exact: 11 and 8 bits
    SY_UNROLL for (int r = 0; r < R; ++r) {
      float sum;
      __builtin_memcpy(&sum, &g.x_sums[r], 4);
      part[r][p] = Fma(scaled_zero, Splat(sum), part[r][p]);
    }
  }
}
SY_INLINE int32_t StartOf(const GroupCursor& g, int r) {
  return g.zeros == nullptr ? g.x_sums[r] : 0;
}

// One step of a tile: the codes of P panels times R rows' words.
#if defined(SY_CPU_AVX2)
template <int R, int P>
SY_INLINE void AddStep8(const uint8_t* codes, const uint32_t* x, Dots8 (&dots)[R][P]) {
  SY_UNROLL for (int p = 0; p < P; ++p) {
    SY_UNROLL for (int h = 0; h < 2; ++h) {
      const CodePairs c = LoadPairs8(codes + p * 64 + h * 32);
      SY_UNROLL for (int r = 0; r < R; ++r) { AddPairs8(&dots[r][p].half[h], c, x[r], x[R + r]); }
    }
  }
}
template <int R, int P>
SY_INLINE void AddStep4(const uint8_t* codes, const uint32_t* x, Dots4 (&dots)[R][P]) {
  SY_UNROLL for (int p = 0; p < P; ++p) {
    SY_UNROLL for (int h = 0; h < 2; ++h) {
      const CodePairs c = LoadPairs4(codes + p * 64 + h * 32);
      SY_UNROLL for (int r = 0; r < R; ++r) { AddPairs4(&dots[r][p].half[h], c, x[r], x[R + r]); }
    }
  }
}
#else
template <int R, int P>
SY_INLINE void AddQuads(const Codes (&codes)[P], const uint32_t* x, Dots8 (&dots)[R][P]) {
  SY_UNROLL for (int r = 0; r < R; ++r) {
    const RowQuad quad = LoadQuad(x + r);
    SY_UNROLL for (int p = 0; p < P; ++p) { dots[r][p] = AddDots8(dots[r][p], codes[p], quad); }
  }
}
template <int R, int P>
SY_INLINE void AddStep8(const uint8_t* codes, const uint32_t* x, Dots8 (&dots)[R][P]) {
  Codes c[P];
  SY_UNROLL for (int p = 0; p < P; ++p) { c[p] = LoadCodes(codes + p * 64); }
  AddQuads<R, P>(c, x, dots);
}
template <int R, int P>
SY_INLINE void AddStep4(const uint8_t* codes, const uint32_t* x, Dots4 (&dots)[R][P]) {
  Codes low[P], high[P];
  SY_UNROLL for (int p = 0; p < P; ++p) {
    const Codes c = LoadCodes(codes + p * 64);
    low[p] = LowHalves(c);
    high[p] = HighHalves(c);
  }
  AddQuads<R, P>(low, x, dots);
  AddQuads<R, P>(high, x + R, dots);
}
#endif

template <int R, int P>
SY_INLINE void AddGroup8(const TileArgs& a, int64_t num_k, GroupCursor& g, F16 (&part)[R][P]) {
  Dots8 dots[R][P];
  SY_UNROLL for (int r = 0; r < R; ++r) {
    SY_UNROLL for (int p = 0; p < P; ++p) { dots[r][p] = StartDots8(StartOf(g, r)); }
  }
  for (int64_t k = 0; k < num_k; k += 4) {
    PrefetchStep<P>(g.codes, g.next);
    AddStep8<R, P>(g.codes, g.x, dots);
    g.x += R * kWordsPerQuad8;
    g.codes += a.step_bytes;
    g.next += a.next_bytes;
  }
  F16 sums[R][P];
  SY_UNROLL for (int r = 0; r < R; ++r) {
    SY_UNROLL for (int p = 0; p < P; ++p) { sums[r][p] = EndDots8(dots[r][p]); }
  }
  AddScaled<R, P>(g, sums, part);
}

template <int R, int P>
SY_INLINE void AddGroup4(const TileArgs& a, int64_t num_k, GroupCursor& g, F16 (&part)[R][P]) {
  constexpr int64_t kFold = 32;
  Dots4 dots[R][P];
  SY_UNROLL for (int r = 0; r < R; ++r) {
    SY_UNROLL for (int p = 0; p < P; ++p) { dots[r][p] = StartDots4(StartOf(g, r)); }
  }
  for (int64_t k0 = 0; k0 < num_k; k0 += kFold) {
    const int64_t end = k0 + kFold < num_k ? k0 + kFold : num_k;
    for (int64_t k = k0; k < end; k += 8) {
      PrefetchStep<P>(g.codes, g.next);
      AddStep4<R, P>(g.codes, g.x, dots);
      g.x += 2 * R;
      g.codes += a.step_bytes;
      g.next += a.next_bytes;
    }
    SY_UNROLL for (int r = 0; r < R; ++r) {
      SY_UNROLL for (int p = 0; p < P; ++p) { dots[r][p] = FoldDots4(dots[r][p]); }
    }
  }
  F16 sums[R][P];
  SY_UNROLL for (int r = 0; r < R; ++r) {
    SY_UNROLL for (int p = 0; p < P; ++p) { sums[r][p] = EndDots4(dots[r][p]); }
  }
  AddScaled<R, P>(g, sums, part);
}

// Every group of 128 inputs: the sum of its groups of weights in ascending order, times the row's
// scale, added to the output's sum.
template <WeightType kType, int R, int P>
void TileQuantized(const TileArgs& a) {
  F16 acc[R][P];
  LoadSums<R, P>(a, acc);
  GroupCursor g = {.x = static_cast<const uint32_t*>(a.x),
                   .codes = reinterpret_cast<const uint8_t*>(a.w),
                   .next = a.next,
                   .x_sums = a.x_sums,
                   .scales = a.scales,
                   .zeros = a.zeros};
  const int64_t code_bytes = a.group / (kType == WeightType::kInt8 ? 4 : 8) * a.step_bytes;
  const int64_t group_bytes = a.header_bytes + code_bytes;
  const float* x_scale = a.x_scales;
  for (int64_t k0 = 0; k0 < a.num_k; k0 += cpu::kActGroup, x_scale += R) {
    F16 part[R][P];
    SY_UNROLL for (int r = 0; r < R; ++r) {
      SY_UNROLL for (int p = 0; p < P; ++p) { part[r][p] = Zero(); }
    }
    for (int64_t k = k0; k < k0 + cpu::kActGroup && k < a.num_k; k += a.group) {
      const int64_t num_k = a.num_k - k < a.group ? a.num_k - k : a.group;
      const std::byte* header = P < cpu::kSlabPanels ? g.next : g.scales + kAheadBytes;
      for (int64_t b = 0; b < a.header_bytes; b += 64) Prefetch(header + b);
      if constexpr (kType == WeightType::kInt8) {
        AddGroup8<R, P>(a, num_k, g, part);
      } else {
        AddGroup4<R, P>(a, num_k, g, part);
      }
      g.codes += a.header_bytes;
      g.next += a.header_bytes * a.next_bytes / a.step_bytes;
      g.x_sums += R;
      g.scales += group_bytes;
      if (g.zeros != nullptr) g.zeros += group_bytes;
    }
    SY_UNROLL for (int r = 0; r < R; ++r) {
      SY_UNROLL for (int p = 0; p < P; ++p) {
        acc[r][p] = Fma(part[r][p], Splat(x_scale[r]), acc[r][p]);
      }
    }
  }
  StoreSums<R, P>(a, acc);
}

constexpr int MaxRowsOf(WeightType type) {
  return IsQuantized({.type = type}) ? kMaxQuantizedRows : kMaxRows;
}

// [type][rows - 1][log2(panels)]
template <WeightType kType, int R, int P>
constexpr TileFn TileOrNull() {
  if constexpr (R > MaxRowsOf(kType) || P > PanelsFor(R)) {
    return nullptr;
  } else if constexpr (kType == WeightType::kF32) {
    return TileF32<R, P>;
  } else if constexpr (kType == WeightType::kBF16) {
    return TileBf16<R, P>;
  } else {
    return TileQuantized<kType, R, P>;
  }
}
#define SY_TILE_ROW(T, R)                                                 \
  {                                                                       \
    TileOrNull<WeightType::T, R, 1>(), TileOrNull<WeightType::T, R, 2>(), \
        TileOrNull<WeightType::T, R, 4>()                                 \
  }
#define SY_TILE_ROWS(T)                                                                            \
  {                                                                                                \
    SY_TILE_ROW(T, 1), SY_TILE_ROW(T, 2), SY_TILE_ROW(T, 3), SY_TILE_ROW(T, 4), SY_TILE_ROW(T, 5), \
        SY_TILE_ROW(T, 6), SY_TILE_ROW(T, 7), SY_TILE_ROW(T, 8), SY_TILE_ROW(T, 9),                \
        SY_TILE_ROW(T, 10), SY_TILE_ROW(T, 11), SY_TILE_ROW(T, 12)                                 \
  }
static_assert(kMaxRows <= cpu::kMaxBlockRows && kMaxQuantizedRows <= kMaxRows);
constexpr TileFn kTiles[4][cpu::kMaxBlockRows][3] = {SY_TILE_ROWS(kF32), SY_TILE_ROWS(kBF16),
                                                     SY_TILE_ROWS(kInt8), SY_TILE_ROWS(kInt4)};
#undef SY_TILE_ROWS
#undef SY_TILE_ROW

}  // namespace switchyard::SY_CPU_PATH
