// Matrix products of one work item: K blocks, panels and tiles in an order that suits the caches,
// and what happens to the sums.
#include "kernels/cpu/matmul_tiles.h"

namespace switchyard::SY_CPU_PATH {
namespace {

using cpu::MatmulItem;

// Of a slab in a K block: what tiles of whole slabs stream, what the halves of one prefetch ahead,
// and what several blocks of rows find in the L1 cache.
constexpr int64_t kStreamBytes = 64 << 10;
constexpr int64_t kHalvesBytes = 16 << 10;
constexpr int64_t kBlockBytes = 32 << 10;
constexpr int64_t kQuantizedBlockBytes = 24 << 10;
constexpr size_t kRowsInCache = size_t{256} << 10;  // of packed rows, in a core's L2

// Inputs are counted in units that may not be cut: one (kF32), a pair (kBF16), 128 (quantised).
SY_INLINE int64_t UnitInputs(WeightFormat f) {
  return IsQuantized(f) ? cpu::kActGroup : f.type == WeightType::kBF16 ? 2 : 1;
}
// 32-bit words of a packed row in a unit.
SY_INLINE int64_t UnitWords(WeightFormat f) {
  if (IsQuantized(f)) return kQuadsPerActGroup * WordsPerQuad(f);
  return f.type == WeightType::kBF16 && !kHasBf16Dot ? 2 : 1;
}

// A block of rows of an item, as its tiles read it.
struct Block {
  int64_t first_row, rows;  // in the group
  const uint32_t* words;
  const float* scales;  // quantised only, as is `sums`
  const int32_t* sums;
};

// An item's geometry, worked out once: tiles may be short, and divisions are not.
struct ItemShape {
  explicit ItemShape(const MatmulItem& item)
      : num_blocks(item.block_end - item.block_begin), unit_inputs(UnitInputs(item.format)) {
    const int64_t blocks_of_group = cpu::NumBlocks(item.rows, item.block_rows);
    const size_t row_bytes = PackedRowBytes(item.k, item.format);
    first_row = cpu::BlockBegin(item.rows, blocks_of_group, item.block_begin);
    int64_t row = first_row;
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t end = cpu::BlockBegin(item.rows, blocks_of_group, item.block_begin + b + 1);
      // const_cast: QuantizedBlock serves the writer too.
      void* x =
          static_cast<std::byte*>(const_cast<void*>(item.x)) + static_cast<size_t>(row) * row_bytes;
      blocks[b] = {.first_row = row,
                   .rows = end - row,
                   .words = static_cast<const uint32_t*>(x),
                   .scales = nullptr,
                   .sums = nullptr};
      if (IsQuantized(item.format)) {
        const QuantizedBlock packed(x, end - row, item.k, item.format);
        blocks[b].scales = packed.scales;
        blocks[b].sums = packed.sums;
      }
      row = end;
    }
    rows = row - first_row;
    stays_in_cache = static_cast<size_t>(rows) * row_bytes <= kRowsInCache;
    max_panels = PanelsFor(static_cast<int>(cpu::CeilDiv(item.rows, blocks_of_group)));
    const int64_t unit_bytes = cpu::SlabBytes(cpu::kSlabPanels, unit_inputs, item.format);
    const int64_t bytes = BlockBytes(item.format);
    block_inputs = (bytes / unit_bytes > 1 ? bytes / unit_bytes : 1) * unit_inputs;
  }
  int64_t BlockBytes(WeightFormat format) const {
    if (num_blocks > 1) return IsQuantized(format) ? kQuantizedBlockBytes : kBlockBytes;
    return max_panels >= cpu::kSlabPanels ? kStreamBytes : kHalvesBytes;
  }

  int64_t num_blocks;
  int64_t unit_inputs;
  int64_t first_row, rows;  // in the group
  bool stays_in_cache;      // the rows
  int64_t max_panels;       // of a tile; the smaller blocks of rows could take more
  int64_t block_inputs;     // of a K block
  Block blocks[cpu::kMaxItemBlocks];
};

// The inputs [k, k + num_k) of the panels [panel, panel + num_panels) of one slab.
struct Stretch {
  int64_t panel, num_panels;
  int64_t k, num_k;
  const std::byte* begin;  // in the slab
  const std::byte* next;   // what is read after it
};

// All tiles of a stretch: one block of rows and 1, 2 or 4 panels each. A tile of fewer panels than
// a slab's prefetches its share of the next stretch, so that memory is busy all the time.
void RunStretch(const MatmulItem& item, const ItemShape& shape, const Stretch& s, float* sums) {
  const int64_t width = cpu::SlabWidth(s.panel, item.num_panels);
  const bool quantized = IsQuantized(item.format);
  TileArgs a{};
  a.step_bytes = width * 64;
  a.num_steps = cpu::CeilDiv(s.num_k, shape.unit_inputs);
  a.num_k = s.num_k;
  a.panel_stride = shape.rows * kLanes;
  a.first = s.k == 0;
  a.group = item.format.group;
  a.header_bytes = quantized ? cpu::CodesOffset(width, item.format) : 0;
  // Of the packed rows before the stretch, for each row.
  const int64_t words_before = s.k / shape.unit_inputs * UnitWords(item.format);
  const int64_t scales_before = s.k / cpu::kActGroup;
  const int64_t sums_before = quantized ? s.k / item.format.group : 0;
  const int64_t shares = s.num_panels * shape.num_blocks;
  const int64_t share = cpu::SlabBytes(width, s.num_k, item.format) / shares;
  const int64_t share_of_step = a.step_bytes / shares;
  a.next = s.next;
  for (int64_t panel = s.panel; panel < s.panel + s.num_panels;) {
    const int64_t left = s.panel + s.num_panels - panel;
    const int log = shape.max_panels >= 4 && left >= 4   ? 2
                    : shape.max_panels >= 2 && left >= 2 ? 1
                                                         : 0;
    const int64_t at = panel % cpu::kSlabPanels;
    a.w = s.begin + a.header_bytes + at * 64;
    a.scales = s.begin + at * 2 * kLanes;
    a.zeros = item.format.zero_points ? s.begin + cpu::ZerosOffset(width) + at * kLanes : nullptr;
    a.next_bytes = share_of_step << log;
    float* const panel_sums = sums + (panel - item.panel_begin) * a.panel_stride;
    for (int64_t b = 0; b < shape.num_blocks; ++b, a.next += share << log) {
      const Block& block = shape.blocks[b];
      a.x = block.words + words_before * block.rows;
      if (quantized) {
        a.x_scales = block.scales + scales_before * block.rows;
        a.x_sums = block.sums + sums_before * block.rows;
      }
      a.sums = panel_sums + (block.first_row - shape.first_row) * kLanes;
      kTiles[static_cast<int>(item.format.type)][block.rows - 1][log](a);
    }
    panel += int64_t{1} << log;
  }
}

// All panels and blocks of an item into sums [panel][row of the item][16].
void Accumulate(const MatmulItem& item, const ItemShape& shape, float* sums) {
  const std::byte* w = static_cast<const std::byte*>(item.w);
  // Stretches are run down a slab or, where `across`, across the item's slabs.
  const auto run = [&](int64_t panel, int64_t k, bool across) {
    const int64_t width = cpu::SlabWidth(panel, item.num_panels);
    const int64_t slab_left = panel / cpu::kSlabPanels * cpu::kSlabPanels + width - panel;
    const int64_t left = item.panel_end - panel;
    Stretch s = {.panel = panel,
                 .num_panels = left < slab_left ? left : slab_left,
                 .k = k,
                 .num_k = item.k - k < shape.block_inputs ? item.k - k : shape.block_inputs,
                 .begin = w + cpu::SlabBegin(panel, item.k, item.format) +
                          cpu::SlabBytes(width, k, item.format),
                 .next = nullptr};
    const bool last_panel = panel + s.num_panels == item.panel_end;
    const bool last_k = k + s.num_k == item.k;
    if (last_panel && last_k) {
      s.next = item.next_w != nullptr ? static_cast<const std::byte*>(item.next_w) : s.begin;
    } else if (across && last_panel) {
      s.next = w + cpu::SlabBegin(item.panel_begin, item.k, item.format) +
               cpu::SlabBytes(cpu::SlabWidth(item.panel_begin, item.num_panels), k + s.num_k,
                              item.format);
    } else {
      const int64_t next_panel = panel + s.num_panels;
      s.next = across
                   ? w + cpu::SlabBegin(next_panel, item.k, item.format) +
                         cpu::SlabBytes(cpu::SlabWidth(next_panel, item.num_panels), k, item.format)
                   : s.begin + cpu::SlabBytes(width, s.num_k, item.format);
    }
    RunStretch(item, shape, s, sums);
    return s.num_panels;
  };
  if (shape.stays_in_cache) {  // stream each slab from end to end
    for (int64_t panel = item.panel_begin; panel < item.panel_end;) {
      int64_t panels = 0;
      for (int64_t k = 0; k < item.k; k += shape.block_inputs) panels = run(panel, k, false);
      panel += panels;
    }
    return;
  }
  for (int64_t k = 0; k < item.k; k += shape.block_inputs) {
    for (int64_t panel = item.panel_begin; panel < item.panel_end;) panel += run(panel, k, true);
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

// Of one row: panel i of the item's at sums + i * stride. Every lane keeps its highest sum.
cpu::Best BestOf(const MatmulItem& item, const float* sums, int64_t stride) {
  constexpr float kInfinity = __builtin_inff();
  F16 best = Splat(-kInfinity), best_panel = Zero(), poison = Zero();
  for (int64_t panel = item.panel_begin; panel < item.panel_end; ++panel, sums += stride) {
    const int64_t count = item.n - panel * kLanes;
    alignas(64) float lanes[kLanes];
    if (count < kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] = j < count ? sums[j] : -kInfinity;
    }
    const F16 v = Load(count < kLanes ? lanes : sums);
    const F16 at = Splat(static_cast<float>(panel - item.panel_begin));
    best_panel = SelectGreater(v, best, at, best_panel);
    best = Max(v, best);  // the second operand where v is NaN
    poison = AddPoison(v, poison);
  }
  alignas(64) float logits[kLanes], panels[kLanes];
  Store(logits, best);
  Store(panels, best_panel);
  cpu::Best row = cpu::kNoBest;
  row.legal = ReduceSum(poison) == 0.0f;
  for (int64_t j = 0; j < kLanes; ++j) {
    const int64_t panel = item.panel_begin + static_cast<int64_t>(panels[j]);
    const int32_t column = static_cast<int32_t>(panel * kLanes + j);
    const bool first = logits[j] == row.logit && column < row.column;
    if (logits[j] > row.logit || first) {
      row.logit = logits[j];
      row.column = column;
    }
  }
  return row;
}

// silu(gate) * up of one row and panel pair.
SY_INLINE F16 Gated(const float* gate, const float* up) {
  return Mul(SiluOf(Load(gate)), Load(up));
}

// The words that tiles of `down` read of 16 hidden values: 8 pairs, or 16.
SY_INLINE void HiddenWords(F16 h, WeightFormat down, uint32_t* words) {
  if (down.type == WeightType::kF32) {
    alignas(64) float lanes[kLanes];
    Store(lanes, h);
    __builtin_memcpy(words, lanes, sizeof(lanes));
    return;
  }
  alignas(64) uint16_t lanes[kLanes];
  StoreBf16(lanes, h);
  if constexpr (kHasBf16Dot) {
    __builtin_memcpy(words, lanes, sizeof(lanes));
  } else {
    for (int j = 0; j < kLanes; ++j) words[j] = static_cast<uint32_t>(lanes[j]) << 16;
  }
}

// The packed hidden rows of an item, a block at a time. The sums of panel pair i and the item's row
// r begin at ((2 * i + {0: gate, 1: up}) * rows + r) * 16.
struct HiddenBlock {
  std::byte* out;
  int64_t rows;       // of the block
  const float* sums;  // of the block's first row and the item's first panel
  int64_t item_rows;
};

void PlaceHidden(const MatmulItem& item, const HiddenBlock& block) {
  const bool pairs = item.down_format.type == WeightType::kBF16;
  // The padding of an odd width is written too: its gate and up are zero, and silu(0) * 0 is zero.
  const int64_t padded = pairs ? (item.width + 1) / 2 * 2 : item.width;
  const int64_t columns_per_word = pairs && kHasBf16Dot ? 2 : 1;
  for (int64_t panel = item.panel_begin; panel < item.panel_end; panel += 2) {
    const float* gate = block.sums + (panel - item.panel_begin) * block.item_rows * kLanes;
    const int64_t column = panel / 2 * kLanes;
    const int64_t count = padded - column < kLanes ? padded - column : kLanes;
    alignas(64) uint32_t words[kMaxInterleaved][kLanes];
    for (int64_t r = 0; r < block.rows; ++r, gate += kLanes)
      HiddenWords(Gated(gate, gate + block.item_rows * kLanes), item.down_format, words[r]);
    Interleave<4>(words, sizeof(words[0]), block.rows, count / columns_per_word,
                  reinterpret_cast<uint32_t*>(block.out) + column / columns_per_word * block.rows);
  }
}

void QuantizeHidden(const MatmulItem& item, const HiddenBlock& block) {
  const QuantizedBlock packed(block.out, block.rows, item.width, item.down_format);
  for (int64_t panel = item.panel_begin; panel < item.panel_end; panel += cpu::kActGroupPanels) {
    PlaceGroups(packed, block.rows, panel / 2 * kLanes, item.width, item.down_format,
                [&](int64_t r, ActGroup* group) {
                  F16 h[kVectorsPerActGroup];
                  for (int i = 0; i < kVectorsPerActGroup; ++i) {
                    const int64_t at = panel - item.panel_begin + 2 * i;
                    const float* gate = block.sums + (at * block.item_rows + r) * kLanes;
                    h[i] = panel + 2 * i < item.panel_end
                               ? Gated(gate, gate + block.item_rows * kLanes)
                               : Zero();
                  }
                  Quantize(h, group);
                });
  }
}

}  // namespace

int MaxRows(WeightFormat format) { return MaxRowsOf(format.type); }

int PanelsForRows(int64_t rows, int block_rows) {
  const int64_t num_blocks = cpu::NumBlocks(rows, block_rows);
  return PanelsFor(static_cast<int>((rows + num_blocks - 1) / num_blocks));
}

void Matmul(const MatmulItem& item) {
  alignas(64) float sums[cpu::kMaxItemTiles * kLanes];
  const ItemShape shape(item);
  Accumulate(item, shape, sums);
  if (item.out_bf16) {
    StoreOutput<uint16_t>(item, sums, shape.first_row, shape.rows);
  } else {
    StoreOutput<float>(item, sums, shape.first_row, shape.rows);
  }
}

void MatmulBest(const MatmulItem& item) {
  alignas(64) float sums[cpu::kMaxItemTiles * kLanes];
  const ItemShape shape(item);
  Accumulate(item, shape, sums);
  for (int64_t r = 0; r < shape.rows; ++r)
    item.best[r] = BestOf(item, sums + r * kLanes, shape.rows * kLanes);
}

void MlpUp(const MatmulItem& item) {
  alignas(64) float sums[cpu::kMaxItemTiles * kLanes];
  const ItemShape shape(item);
  Accumulate(item, shape, sums);
  const size_t row_bytes = PackedRowBytes(item.width, item.down_format);
  for (int64_t b = 0; b < shape.num_blocks; ++b) {
    const Block& rows = shape.blocks[b];
    const HiddenBlock block = {.out = static_cast<std::byte*>(item.packed_out) +
                                      static_cast<size_t>(rows.first_row) * row_bytes,
                               .rows = rows.rows,
                               .sums = sums + (rows.first_row - shape.first_row) * kLanes,
                               .item_rows = shape.rows};
    if (IsQuantized(item.down_format)) {
      QuantizeHidden(item, block);
    } else {
      PlaceHidden(item, block);
    }
  }
}

}  // namespace switchyard::SY_CPU_PATH
