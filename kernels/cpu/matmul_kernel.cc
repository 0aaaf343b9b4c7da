// Matrix products of one work item: K blocks, panels and tiles in an order that suits the caches,
// and what happens to the sums.
#include "kernels/cpu/matmul_tiles.h"

namespace switchyard::SY_CPU_PATH {
namespace {

using cpu::MatmulItem;

constexpr int64_t kBlockBytes = 16 << 10;  // a panel's share of a K block: half of the L1 cache
constexpr size_t kRowsInCache = size_t{256} << 10;  // of packed rows, in a core's L2

// A step is one input (float32), a pair (bfloat16) or a group of kActGroup (quantised).
struct FormatShape {
  explicit FormatShape(WeightFormat f)
      : format(f),
        step_inputs(IsQuantized(f)                ? cpu::kActGroup
                    : f.type == WeightType::kBF16 ? 2
                                                  : 1),
        step_bytes(f.type == WeightType::kInt8   ? cpu::kActGroup * kLanes
                   : f.type == WeightType::kInt4 ? cpu::kActGroup * kLanes / 2
                                                 : 64),
        step_words(IsQuantized(f) ? kQuadsPerActGroup * WordsPerQuad(f)
                   : f.type == WeightType::kBF16 && !kHasBf16Dot ? 2
                                                                 : 1) {}
  WeightFormat format;
  int64_t step_inputs;
  int64_t step_bytes;  // of a panel
  int64_t step_words;  // of 32 bits, of a packed row
};

// An item's geometry, worked out once.
struct ItemShape {
  explicit ItemShape(const MatmulItem& item)
      : steps_of(item.format),
        num_blocks(cpu::NumBlocks(item.rows, kMaxRows)),
        first_row(cpu::BlockBegin(item.rows, num_blocks, item.block_begin)),
        rows(cpu::BlockBegin(item.rows, num_blocks, item.block_end) - first_row),
        one_block(item.block_end - item.block_begin == 1),
        panel_bytes(cpu::PanelBytes(item.k, item.format)),
        row_bytes(PackedRowBytes(item.k, item.format)),
        num_steps(cpu::CeilDiv(item.k, steps_of.step_inputs)) {}
  FormatShape steps_of;
  int64_t num_blocks;  // of the whole group
  int64_t first_row;   // of the item, in the group
  int64_t rows;        // of the item
  bool one_block;      // of the item
  size_t panel_bytes;
  size_t row_bytes;
  int64_t num_steps;  // along k
};

// Some panels and steps of an item.
struct Stretch {
  int64_t panel;
  int log_panels;
  int64_t step;
  int64_t num_steps;
};

// One block of rows of a stretch.
void RunTile(const MatmulItem& item, const ItemShape& shape, int64_t block, TileArgs a,
             const Stretch& stretch) {
  const int64_t row = cpu::BlockBegin(item.rows, shape.num_blocks, block);
  const int64_t rows = cpu::BlockBegin(item.rows, shape.num_blocks, block + 1) - row;
  // const_cast: QuantizedBlock serves the writer too.
  void* x = static_cast<std::byte*>(const_cast<void*>(item.x)) +
            static_cast<size_t>(row) * shape.row_bytes;
  a.x = static_cast<const uint32_t*>(x) + stretch.step * shape.steps_of.step_words * rows;
  if (IsQuantized(item.format)) {
    const QuantizedBlock packed(x, rows, item.k, item.format);
    a.x_scales = packed.scales + stretch.step * rows;
    a.x_sums = packed.sums + stretch.step * (cpu::kActGroup / item.format.group) * rows;
  }
  a.sums += (row - shape.first_row) * kLanes;
  kTiles[FormatIndex(item.format)][rows - 1][stretch.log_panels](a);
}

// All blocks of a stretch.
void RunStretch(const MatmulItem& item, const ItemShape& shape, const Stretch& stretch,
                float* sums) {
  const std::byte* panel = static_cast<const std::byte*>(item.w) +
                           static_cast<size_t>(stretch.panel) * shape.panel_bytes;
  const int64_t first_input = stretch.step * shape.steps_of.step_inputs;
  const int64_t num_inputs = stretch.num_steps * shape.steps_of.step_inputs;
  const int64_t left = item.k - first_input;
  TileArgs a{};
  a.w = panel + static_cast<size_t>(stretch.step * shape.steps_of.step_bytes);
  a.panel_bytes = shape.panel_bytes;
  a.num_steps = stretch.num_steps;
  a.num_k = num_inputs < left ? num_inputs : left;
  a.panel_stride = shape.rows * kLanes;
  a.sums = sums + (stretch.panel - item.panel_begin) * a.panel_stride;
  a.first = stretch.step == 0;
  if (IsQuantized(item.format)) {
    const size_t group = static_cast<size_t>(first_input / item.format.group);
    a.w += cpu::CodesOffset(item.k, item.format);
    a.scales = panel + group * 2 * kLanes;
    a.zeros = panel + cpu::ZerosOffset(item.k, item.format) + group * kLanes;
  }
  for (int64_t b = item.block_begin; b < item.block_end; ++b) RunTile(item, shape, b, a, stretch);
}

// All panels and blocks of an item into sums [panel][row of the item][16].
void Accumulate(const MatmulItem& item, float* sums) {
  const ItemShape shape(item);
  // A block's tiles take as many panels as those of the largest block; smaller ones could take
  // more.
  const int max_rows = static_cast<int>(cpu::CeilDiv(item.rows, shape.num_blocks));
  const int64_t max_panels = PanelsFor(max_rows);
  // With one block of rows the weights are read once anyway: no K blocks.
  const int64_t block_steps =
      shape.one_block ? shape.num_steps : kBlockBytes / shape.steps_of.step_bytes;
  const auto log_panels = [&](int64_t panel) {
    const int64_t left = item.panel_end - panel;
    return max_panels >= 4 && left >= 4 ? 2 : max_panels >= 2 && left >= 2 ? 1 : 0;
  };
  const auto run = [&](int64_t panel, int log, int64_t step) {
    const int64_t left = shape.num_steps - step;
    RunStretch(item, shape, {panel, log, step, left < block_steps ? left : block_steps}, sums);
  };
  if (static_cast<size_t>(shape.rows) * shape.row_bytes <= kRowsInCache) {
    // The rows stay in the cache: stream each panel from end to end.
    for (int64_t panel = item.panel_begin; panel < item.panel_end;) {
      const int log = log_panels(panel);
      for (int64_t step = 0; step < shape.num_steps; step += block_steps) run(panel, log, step);
      panel += int64_t{1} << log;
    }
    return;
  }
  for (int64_t step = 0; step < shape.num_steps; step += block_steps) {
    for (int64_t panel = item.panel_begin; panel < item.panel_end;) {
      const int log = log_panels(panel);
      run(panel, log, step);
      panel += int64_t{1} << log;
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

// silu(gate) * up of one row and panel pair.
SY_INLINE F16 Gated(const float* gate, const float* up) {
  return Mul(SiluOf(Load(gate)), Load(up));
}

// Columns [column, column + count) of row r of a packed block.
void PlaceColumns(const MatmulItem& item, std::byte* block, int64_t block_rows, int64_t r,
                  int64_t column, int64_t count, F16 h) {
  if (item.down_format.type == WeightType::kF32) {
    alignas(64) float lanes[kLanes];
    Store(lanes, h);
    float* out = reinterpret_cast<float*>(block) + column * block_rows + r;
    for (int64_t j = 0; j < count; ++j) out[j * block_rows] = lanes[j];
    return;
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

// The packed hidden rows of an item, a block at a time. The sums of panel pair i and the item's row
// r begin at ((2 * i + {0: gate, 1: up}) * rows + r) * 16.
struct HiddenBlock {
  std::byte* out;
  int64_t rows;       // of the block
  const float* sums;  // of the block's first row and the item's first panel
  int64_t item_rows;
};

void PlaceHidden(const MatmulItem& item, const HiddenBlock& block) {
  // The padding of an odd width is written too: its gate and up are zero, and silu(0) * 0 is zero.
  const int64_t padded =
      item.down_format.type == WeightType::kBF16 ? (item.width + 1) / 2 * 2 : item.width;
  for (int64_t panel = item.panel_begin; panel < item.panel_end; panel += 2) {
    const float* gate = block.sums + (panel - item.panel_begin) * block.item_rows * kLanes;
    const int64_t column = panel / 2 * kLanes;
    const int64_t count = padded - column < kLanes ? padded - column : kLanes;
    for (int64_t r = 0; r < block.rows; ++r, gate += kLanes) {
      PlaceColumns(item, block.out, block.rows, r, column, count,
                   Gated(gate, gate + block.item_rows * kLanes));
    }
  }
}

void QuantizeHidden(const MatmulItem& item, const HiddenBlock& block) {
  const QuantizedBlock packed(block.out, block.rows, item.width, item.down_format);
  ActGroup group;
  for (int64_t panel = item.panel_begin; panel < item.panel_end; panel += cpu::kActGroupPanels) {
    for (int64_t r = 0; r < block.rows; ++r) {
      F16 h[kVectorsPerActGroup];
      for (int i = 0; i < kVectorsPerActGroup; ++i) {
        const float* gate =
            block.sums + ((panel - item.panel_begin + 2 * i) * block.item_rows + r) * kLanes;
        h[i] =
            panel + 2 * i < item.panel_end ? Gated(gate, gate + block.item_rows * kLanes) : Zero();
      }
      Quantize(h, &group);
      PlaceGroup(group, packed, block.rows, r, panel / 2 * kLanes, item.width, item.down_format);
    }
  }
}

}  // namespace

int PanelsForRows(int64_t rows) {
  const int64_t num_blocks = cpu::NumBlocks(rows, kMaxRows);
  return PanelsFor(static_cast<int>((rows + num_blocks - 1) / num_blocks));
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
  const size_t row_bytes = PackedRowBytes(item.width, item.down_format);
  for (int64_t b = item.block_begin; b < item.block_end; ++b) {
    const int64_t row = cpu::BlockBegin(item.rows, num_blocks, b);
    const HiddenBlock block = {
        .out = static_cast<std::byte*>(item.packed_out) + static_cast<size_t>(row) * row_bytes,
        .rows = cpu::BlockBegin(item.rows, num_blocks, b + 1) - row,
        .sums = sums + (row - begin) * kLanes,
        .item_rows = rows};
    if (IsQuantized(item.down_format)) {
      QuantizeHidden(item, block);
    } else {
      PlaceHidden(item, block);
    }
  }
}

}  // namespace switchyard::SY_CPU_PATH
