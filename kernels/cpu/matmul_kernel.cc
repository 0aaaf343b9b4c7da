// Matrix products of one work item: K blocks, panels and tiles in an order that suits the caches,
// and what happens to the sums.
#include "kernels/cpu/matmul_tiles.h"

namespace switchyard::SY_CPU_PATH {
namespace {

using cpu::MatmulItem;

// Of a slab in a K block: what one block of rows streams, and what several find in the caches.
constexpr int64_t kStreamBytes = 16 << 10;
constexpr int64_t kBlockBytes = 32 << 10;
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

// An item's geometry, worked out once.
struct ItemShape {
  explicit ItemShape(const MatmulItem& item)
      : num_blocks(cpu::NumBlocks(item.rows, kMaxRows)),
        first_row(cpu::BlockBegin(item.rows, num_blocks, item.block_begin)),
        rows(cpu::BlockBegin(item.rows, num_blocks, item.block_end) - first_row),
        max_panels(PanelsFor(static_cast<int>(cpu::CeilDiv(item.rows, num_blocks)))),
        row_bytes(PackedRowBytes(item.k, item.format)),
        unit_inputs(UnitInputs(item.format)) {
    const int64_t unit_bytes = cpu::SlabBytes(cpu::kSlabPanels, unit_inputs, item.format);
    const int64_t bytes = item.block_end - item.block_begin == 1 ? kStreamBytes : kBlockBytes;
    block_inputs = (bytes / unit_bytes > 1 ? bytes / unit_bytes : 1) * unit_inputs;
  }
  int64_t num_blocks;  // of the whole group
  int64_t first_row;   // of the item, in the group
  int64_t rows;        // of the item
  int64_t max_panels;  // of a tile; the smaller blocks of rows could take more
  size_t row_bytes;
  int64_t unit_inputs;
  int64_t block_inputs;  // of a K block
};

// The inputs [k, k + num_k) of the panels [panel, panel + num_panels) of one slab.
struct Stretch {
  int64_t panel, num_panels;
  int64_t k, num_k;
  const std::byte* begin;  // in the slab
  const std::byte* next;   // the stretch after it
};

// A tile: one block of rows and 2^log_panels panels of a stretch.
void RunTile(const MatmulItem& item, const ItemShape& shape, int64_t block, int log_panels,
             TileArgs a, int64_t k) {
  const int64_t row = cpu::BlockBegin(item.rows, shape.num_blocks, block);
  const int64_t rows = cpu::BlockBegin(item.rows, shape.num_blocks, block + 1) - row;
  // const_cast: QuantizedBlock serves the writer too.
  void* x = static_cast<std::byte*>(const_cast<void*>(item.x)) +
            static_cast<size_t>(row) * shape.row_bytes;
  a.x = static_cast<const uint32_t*>(x) + k / shape.unit_inputs * UnitWords(item.format) * rows;
  if (IsQuantized(item.format)) {
    const QuantizedBlock packed(x, rows, item.k, item.format);
    a.x_scales = packed.scales + k / cpu::kActGroup * rows;
    a.x_sums = packed.sums + k / item.format.group * rows;
  }
  a.sums += (row - shape.first_row) * kLanes;
  kTiles[static_cast<int>(item.format.type)][rows - 1][log_panels](a);
}

// All tiles of a stretch. A tile of fewer panels than a slab's prefetches its share of the next
// stretch, so that memory is busy all the time.
void RunStretch(const MatmulItem& item, const ItemShape& shape, const Stretch& s, float* sums) {
  const int64_t width = cpu::SlabWidth(s.panel, item.num_panels);
  const int64_t num_blocks = item.block_end - item.block_begin;
  const bool quantized = IsQuantized(item.format);
  TileArgs a{};
  a.step_bytes = width * 64;
  a.num_steps = cpu::CeilDiv(s.num_k, shape.unit_inputs);
  a.num_k = s.num_k;
  a.panel_stride = shape.rows * kLanes;
  a.first = s.k == 0;
  a.group = item.format.group;
  a.header_bytes = quantized ? cpu::CodesOffset(width, item.format) : 0;
  const int64_t bytes = cpu::SlabBytes(width, s.num_k, item.format);
  int64_t done = 0;  // panels
  for (int64_t panel = s.panel; panel < s.panel + s.num_panels;) {
    const int64_t left = s.panel + s.num_panels - panel;
    const int log = shape.max_panels >= 4 && left >= 4   ? 2
                    : shape.max_panels >= 2 && left >= 2 ? 1
                                                         : 0;
    const int64_t at = panel % cpu::kSlabPanels;
    a.w = s.begin + a.header_bytes + at * 64;
    a.scales = s.begin + at * 2 * kLanes;
    a.zeros = item.format.zero_points ? s.begin + cpu::ZerosOffset(width) + at * kLanes : nullptr;
    a.sums = sums + (panel - item.panel_begin) * a.panel_stride;
    a.next_bytes = (a.step_bytes << log) / (s.num_panels * num_blocks);
    for (int64_t b = 0; b < num_blocks; ++b) {
      a.next = s.next + bytes * (done * num_blocks + (b << log)) / (s.num_panels * num_blocks);
      RunTile(item, shape, item.block_begin + b, log, a, s.k);
    }
    panel += int64_t{1} << log;
    done += int64_t{1} << log;
  }
}

// All panels and blocks of an item into sums [panel][row of the item][16].
void Accumulate(const MatmulItem& item, float* sums) {
  const ItemShape shape(item);
  const std::byte* w = static_cast<const std::byte*>(item.w);
  const auto run = [&](int64_t panel, int64_t k, bool down_the_slab) {
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
    s.next = s.begin + cpu::SlabBytes(width, down_the_slab ? s.num_k : item.k, item.format);
    RunStretch(item, shape, s, sums);
    return s.num_panels;
  };
  if (static_cast<size_t>(shape.rows) * shape.row_bytes <= kRowsInCache) {
    // The rows stay in the cache: stream each slab from end to end.
    for (int64_t panel = item.panel_begin; panel < item.panel_end;) {
      int64_t panels = 0;
      for (int64_t k = 0; k < item.k; k += shape.block_inputs) panels = run(panel, k, true);
      panel += panels;
    }
    return;
  }
  for (int64_t k = 0; k < item.k; k += shape.block_inputs) {
    for (int64_t panel = item.panel_begin; panel < item.panel_end;) panel += run(panel, k, false);
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
