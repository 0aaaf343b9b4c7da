// Matrix products: every output element is one sequential accumulation over k (or over pairs of k),
// whatever the number of rows, panels or threads. Partial sums that are put down between K blocks
// are float32, as in the registers.
#include "kernels/cpu/kernels.h"

namespace switchyard::SY_CPU_PATH {
namespace {

using cpu::MatmulItem;

// Packed activations of a bfloat16 product: pairs where there is a dot product, else float32.
constexpr int64_t kXPerPair = kHasBf16Dot ? 1 : 2;  // 32-bit words per row and pair
constexpr int64_t kBlockSteps = 256;  // a panel of them is 16 KiB: half of the L1 cache
constexpr size_t kRowsInCache = size_t{256} << 10;  // of packed rows, in a core's L2
constexpr int64_t kPrefetchBytes = 1024;

struct TileArgs {
  const uint32_t* x;   // packed block at the first k
  const std::byte* w;  // first panel at the first k
  size_t panel_bytes;
  int64_t k;             // to run: elements (float32) or pairs (bfloat16)
  float* sums;           // [panel][row][16]
  int64_t panel_stride;  // floats between panels of `sums`
  bool first;            // start from zero
};

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
  const float* x = reinterpret_cast<const float*>(a.x);
  const float* w = reinterpret_cast<const float*>(a.w);
  const size_t stride = a.panel_bytes / sizeof(float);
  for (int64_t k = 0; k < a.k; ++k, x += R, w += kLanes) {
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
  const uint32_t* x = a.x;
  for (int64_t k = 0; k < a.k; ++k, x += R, w += 2 * kLanes) {
    for (int p = 0; p < P; ++p) {
      Prefetch(reinterpret_cast<const std::byte*>(w + static_cast<size_t>(p) * stride) +
               kPrefetchBytes);
      const auto wv = LoadPair(w + static_cast<size_t>(p) * stride);
      for (int r = 0; r < R; ++r) acc[r][p] = DotPair(acc[r][p], wv, x[r]);
    }
  }
#else
  const float* x = reinterpret_cast<const float*>(a.x);
  for (int64_t k = 0; k < a.k; ++k, x += 2 * R, w += 2 * kLanes) {
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

using TileFn = void (*)(const TileArgs&);

template <int R, int P>
constexpr TileFn TileOrNull(bool bf16) {
  if constexpr (R <= kMaxRows && P <= PanelsFor(R)) {
    return bf16 ? TileBf16<R, P> : TileF32<R, P>;
  } else {
    return nullptr;
  }
}

// kTiles[bf16][rows - 1][log2(panels)]
#define SY_TILE_ROW(R, B) \
  { TileOrNull<R, 1>(B), TileOrNull<R, 2>(B), TileOrNull<R, 4>(B) }
#define SY_TILE_ROWS(B)                                                                            \
  {                                                                                                \
    SY_TILE_ROW(1, B), SY_TILE_ROW(2, B), SY_TILE_ROW(3, B), SY_TILE_ROW(4, B), SY_TILE_ROW(5, B), \
        SY_TILE_ROW(6, B), SY_TILE_ROW(7, B), SY_TILE_ROW(8, B)                                    \
  }
constexpr TileFn kTiles[2][8][3] = {SY_TILE_ROWS(false), SY_TILE_ROWS(true)};
#undef SY_TILE_ROWS
#undef SY_TILE_ROW

size_t XRowBytes(int64_t k, bool bf16) {
  return static_cast<size_t>(bf16 ? (k + 1) / 2 * kXPerPair : k) * 4;
}

// An item's geometry, worked out once.
struct ItemShape {
  explicit ItemShape(const MatmulItem& item)
      : num_blocks(cpu::NumBlocks(item.rows, kMaxRows)),
        first_row(cpu::BlockBegin(item.rows, num_blocks, item.block_begin)),
        rows(cpu::BlockBegin(item.rows, num_blocks, item.block_end) - first_row),
        one_block(item.block_end - item.block_begin == 1),
        panel_bytes(cpu::PanelBytes(item.k, item.bf16)),
        row_bytes(XRowBytes(item.k, item.bf16)),
        steps(item.bf16 ? (item.k + 1) / 2 : item.k),
        x_words(item.bf16 ? kXPerPair : 1) {}
  int64_t num_blocks;  // of the whole group
  int64_t first_row;   // of the item, in the group
  int64_t rows;        // of the item
  bool one_block;      // of the item
  size_t panel_bytes;
  size_t row_bytes;
  int64_t steps;    // along k: elements (float32) or pairs (bfloat16)
  int64_t x_words;  // of 32 bits, per row and step
};

// Steps [k0, k0 + num_steps) of one block of rows and 2^log_panels panels.
void RunTile(const MatmulItem& item, const ItemShape& shape, int64_t block, TileArgs a, int64_t k0,
             int64_t num_steps, int log_panels) {
  const int64_t row = cpu::BlockBegin(item.rows, shape.num_blocks, block);
  const int64_t rows = cpu::BlockBegin(item.rows, shape.num_blocks, block + 1) - row;
  const std::byte* x =
      static_cast<const std::byte*>(item.x) + static_cast<size_t>(row) * shape.row_bytes;
  a.x = reinterpret_cast<const uint32_t*>(x) + k0 * shape.x_words * rows;
  a.k = num_steps;
  a.sums += (row - shape.first_row) * kLanes;
  a.first = k0 == 0;
  kTiles[item.bf16][rows - 1][log_panels](a);
}

// Steps [k0, k0 + num_steps) of all blocks and 2^log_panels panels.
void RunPanels(const MatmulItem& item, const ItemShape& shape, int64_t panel, int log_panels,
               int64_t k0, int64_t num_steps, float* sums) {
  TileArgs a{};
  a.w = static_cast<const std::byte*>(item.w) + static_cast<size_t>(panel) * shape.panel_bytes +
        static_cast<size_t>(k0) * 64;
  a.panel_bytes = shape.panel_bytes;
  a.panel_stride = shape.rows * kLanes;
  a.sums = sums + (panel - item.panel_begin) * a.panel_stride;
  for (int64_t b = item.block_begin; b < item.block_end; ++b)
    RunTile(item, shape, b, a, k0, num_steps, log_panels);
}

// All panels and blocks of an item into sums [panel][row of the item][16].
void Accumulate(const MatmulItem& item, float* sums) {
  const ItemShape shape(item);
  // A block's tiles take as many panels as those of the largest block; smaller ones could take
  // more.
  const int max_rows = static_cast<int>((item.rows + shape.num_blocks - 1) / shape.num_blocks);
  const int64_t max_panels = PanelsFor(max_rows);
  const auto log_panels = [&](int64_t panel) {
    const int64_t left = item.panel_end - panel;
    return max_panels >= 4 && left >= 4 ? 2 : max_panels >= 2 && left >= 2 ? 1 : 0;
  };
  // With one block of rows the weights are read once anyway: no K blocks.
  const int64_t block_steps = shape.one_block ? shape.steps : kBlockSteps;
  const auto count = [&](int64_t k0) {
    return shape.steps - k0 < block_steps ? shape.steps - k0 : block_steps;
  };
  if (static_cast<size_t>(shape.rows) * shape.row_bytes <= kRowsInCache) {
    // The rows stay in the cache: stream each panel from end to end.
    for (int64_t panel = item.panel_begin; panel < item.panel_end;) {
      const int log = log_panels(panel);
      for (int64_t k0 = 0; k0 < shape.steps; k0 += block_steps)
        RunPanels(item, shape, panel, log, k0, count(k0), sums);
      panel += int64_t{1} << log;
    }
    return;
  }
  for (int64_t k0 = 0; k0 < shape.steps; k0 += block_steps) {
    for (int64_t panel = item.panel_begin; panel < item.panel_end;) {
      const int log = log_panels(panel);
      RunPanels(item, shape, panel, log, k0, count(k0), sums);
      panel += int64_t{1} << log;
    }
  }
}

template <typename T>
void PackRowsAs(const T* x, int64_t ld, int64_t rows, int64_t k, float* out) {
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
void StoreOutput(const MatmulItem& item, const float* sums, int64_t row_begin, int64_t rows) {
  for (int64_t panel = item.panel_begin; panel < item.panel_end; ++panel) {
    const int64_t column = panel * kLanes;
    const int64_t count = item.n - column < kLanes ? item.n - column : kLanes;
    const F16 bias = item.bias == nullptr ? Zero() : LoadSome(item.bias + column, count);
    T* out = static_cast<T*>(item.out) + row_begin * item.out_ld + column;
    for (int64_t r = 0; r < rows; ++r, sums += kLanes, out += item.out_ld) {
      const F16 v = Load(sums);
      StoreSome(out, item.bias == nullptr ? v : Add(v, bias), count);
    }
  }
}

}  // namespace

size_t PackedRowBytes(int64_t k, bool bf16) { return XRowBytes(k, bf16); }

int PanelsForRows(int64_t rows) {
  const int64_t num_blocks = cpu::NumBlocks(rows, kMaxRows);
  return PanelsFor(static_cast<int>((rows + num_blocks - 1) / num_blocks));
}

void PackRows(const cpu::PackRowsItem& item) {
  if (!item.bf16) {
    PackRowsAs(static_cast<const float*>(item.x), item.ld, item.rows, item.k,
               static_cast<float*>(item.out));
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(item.x);
  if constexpr (kHasBf16Dot) {
    PackPairs(x, item.ld, item.rows, item.k, static_cast<uint32_t*>(item.out));
  } else {
    float* out = static_cast<float*>(item.out);
    PackRowsAs(x, item.ld, item.rows, item.k, out);
    for (int64_t r = 0; item.k % 2 != 0 && r < item.rows; ++r) out[item.k * item.rows + r] = 0.0f;
  }
}

void Matmul(const MatmulItem& item) {
  alignas(64) float sums[cpu::kMaxItemTiles * kLanes];
  Accumulate(item, sums);
  const int64_t num_blocks = cpu::NumBlocks(item.rows, kMaxRows);
  const int64_t begin = cpu::BlockBegin(item.rows, num_blocks, item.block_begin);
  const int64_t rows = cpu::BlockBegin(item.rows, num_blocks, item.block_end) - begin;
  if (item.out_bf16) {
    StoreOutput<uint16_t>(item, sums, begin, rows);
  } else {
    StoreOutput<float>(item, sums, begin, rows);
  }
}

void MlpUp(const MatmulItem& item) {
  alignas(64) float sums[cpu::kMaxItemTiles * kLanes];
  Accumulate(item, sums);
  const int64_t num_blocks = cpu::NumBlocks(item.rows, kMaxRows);
  const int64_t begin = cpu::BlockBegin(item.rows, num_blocks, item.block_begin);
  const int64_t rows = cpu::BlockBegin(item.rows, num_blocks, item.block_end) - begin;
  const size_t row_bytes = XRowBytes(item.width, item.bf16);
  // The padding of an odd width is written too: its gate and up are zero, and silu(0) * 0 is zero.
  const int64_t padded = item.bf16 ? (item.width + 1) / 2 * 2 : item.width;
  for (int64_t panel = item.panel_begin; panel < item.panel_end; panel += 2) {
    const float* gate = sums + (panel - item.panel_begin) * rows * kLanes;
    const float* up = gate + rows * kLanes;
    const int64_t column = panel / 2 * kLanes;
    const int64_t count = padded - column < kLanes ? padded - column : kLanes;
    for (int64_t b = item.block_begin; b < item.block_end; ++b) {
      const int64_t row = cpu::BlockBegin(item.rows, num_blocks, b);
      const int64_t block_rows = cpu::BlockBegin(item.rows, num_blocks, b + 1) - row;
      std::byte* block =
          static_cast<std::byte*>(item.packed_out) + static_cast<size_t>(row) * row_bytes;
      for (int64_t r = 0; r < block_rows; ++r) {
        const int64_t at = (row - begin + r) * kLanes;
        const F16 h = Mul(SiluOf(Load(gate + at)), Load(up + at));
        if (!item.bf16) {
          alignas(64) float lanes[kLanes];
          Store(lanes, h);
          float* out = reinterpret_cast<float*>(block) + column * block_rows + r;
          for (int64_t j = 0; j < count; ++j) out[j * block_rows] = lanes[j];
          continue;
        }
        alignas(64) uint16_t lanes[kLanes];
        StoreBf16(lanes, h);
        if constexpr (kHasBf16Dot) {
          uint32_t* out = reinterpret_cast<uint32_t*>(block) + column / 2 * block_rows + r;
          for (int64_t j = 0; j < count; j += 2)
            out[j / 2 * block_rows] = lanes[j] | static_cast<uint32_t>(lanes[j + 1]) << 16;
        } else {
          float* out = reinterpret_cast<float*>(block) + column * block_rows + r;
          for (int64_t j = 0; j < count; ++j) out[j * block_rows] = ScalarFromBf16(lanes[j]);
        }
      }
    }
  }
}

}  // namespace switchyard::SY_CPU_PATH
