// KernelTable: what one instruction path offers, as plain functions on raw memory. Each function is
// one work item for one thread: no threads, no allocation, no checks. CpuBackend cuts ops into
// items. Element types are float or uint16_t (bfloat16 bits); `bf16` flags say which.
//
// A weight panel is 16 output columns, so that a 32-bit lane belongs to one column. Four panels lie
// interleaved in a slab (the last slab may have fewer), so that however many panels are read at
// once memory is read in one stream. A slab of `width` panels, K-major:
//   kF32   [k][width][16]
//   kBF16  [ceil(k/2)][width][16][2]: pairs (k, k+1)
//   kInt8  for each group of inputs: scales [width][16] float16, zero points [width][16] uint8 if
//          there are any (each padded to 64 bytes), codes [group/4][width][16][4]
//   kInt4  the same with codes [group/8][width][16][4]: low halves k … k+3, high halves k+4 … k+7
// Padding is zero weights. One layout for every number of rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/weight_format.h"

// Functions here are used by files of every path: always inlined, so that no path's copy is ever
// linked for another.
#define SY_SHARED [[gnu::always_inline]] inline

namespace switchyard::cpu {

constexpr int64_t kPanelColumns = 16;
constexpr int kAttentionSplit = 256;  // absolute positions per split: a numerics constant
// At most, an item's rows * panels of 16 partial sums.
constexpr int64_t kMaxItemTiles = 768;
constexpr int64_t kMaxItemBlocks = 48;  // of rows in an item
constexpr int kMaxBlockRows = 12;       // of any path

SY_SHARED constexpr int64_t NumPanels(int64_t n) { return (n + kPanelColumns - 1) / kPanelColumns; }
SY_SHARED constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Inputs of a row that share a scale where activations are quantised: a numerics constant, the
// largest group of weights.
constexpr int64_t kActGroup = 128;

constexpr int64_t kSlabPanels = 4;
// Of the slab that holds `panel`.
SY_SHARED constexpr int64_t SlabWidth(int64_t panel, int64_t num_panels) {
  const int64_t left = num_panels - panel / kSlabPanels * kSlabPanels;
  return left < kSlabPanels ? left : kSlabPanels;
}
// The parts of one group of a quantised slab: offsets in bytes from the group's start.
SY_SHARED constexpr int64_t ZerosOffset(int64_t width) { return CeilDiv(width, 2) * 64; }
SY_SHARED constexpr int64_t CodesOffset(int64_t width, WeightFormat f) {
  return ZerosOffset(width) + (f.zero_points ? 64 : 0);
}
// Bytes of the first `k` inputs of a slab; a whole number of groups unless it is the slab's end.
SY_SHARED constexpr int64_t SlabBytes(int64_t width, int64_t k, WeightFormat f) {
  switch (f.type) {
    case WeightType::kF32:
      return k * width * 64;
    case WeightType::kBF16:
      return CeilDiv(k, 2) * width * 64;
    case WeightType::kInt8:
    case WeightType::kInt4:
      break;
  }
  return CeilDiv(k, f.group) * CodesOffset(width, f) +
         CeilDiv(k, f.type == WeightType::kInt8 ? 4 : 8) * width * 64;
}
// Bytes before the slab that holds `panel`.
SY_SHARED constexpr int64_t SlabBegin(int64_t panel, int64_t k, WeightFormat f) {
  return panel / kSlabPanels * SlabBytes(kSlabPanels, k, f);
}
SY_SHARED constexpr size_t MatrixBytes(int64_t num_panels, int64_t k, WeightFormat f) {
  return static_cast<size_t>(
      SlabBegin(num_panels, k, f) +
      (num_panels % kSlabPanels == 0 ? 0 : SlabBytes(num_panels % kSlabPanels, k, f)));
}

// A group of rows is cut into NumBlocks() blocks of almost equal size, at most block_rows each.
SY_SHARED constexpr int64_t NumBlocks(int64_t rows, int block_rows) {
  return (rows + block_rows - 1) / block_rows;
}
SY_SHARED constexpr int64_t BlockBegin(int64_t rows, int64_t num_blocks, int64_t block) {
  return rows * block / num_blocks;
}

// Copies the rows of one block into the form that the tiles of a weight format read: [k][rows]
// (pairs of bfloat16 where the path has a dot product, else float32), or quantised: see
// row_packing.h.
struct PackRowsItem {
  const void* x = nullptr;  // the block's first row
  bool bf16 = false;        // x's type
  int64_t ld = 0;           // elements between rows
  int64_t rows = 0;         // 1..block_rows of its product
  int64_t k = 0;
  WeightFormat format = {};
  void* out = nullptr;
};

// The highest of some logits of one row, of equal ones the first.
struct Best {
  float logit;
  int32_t column;  // -1: none is above -inf
  bool legal;      // none is NaN or +inf
};
constexpr Best kNoBest = {.logit = -__builtin_inff(), .column = -1, .legal = true};

// Blocks x panels of one product.
// REQUIRES: at most kMaxItemBlocks blocks, rows * panels <= kMaxItemTiles.
struct MatmulItem {
  const void* x = nullptr;  // packed rows of the whole group
  int64_t rows = 0;         // rows of the group
  int block_rows = 1;       // at most, in a block
  int64_t block_begin = 0, block_end = 0;
  const void* w = nullptr;  // slabs of the whole matrix
  int64_t num_panels = 0;   // of the whole matrix
  int64_t k = 0;
  WeightFormat format = {};
  int64_t panel_begin = 0, panel_end = 0;
  // What this thread probably reads next, null if that is not known: tiles of fewer panels than a
  // slab's prefetch it in the item's last stretch.
  const void* next_w = nullptr;
  // Epilogue of matmul: out[row][column] of type out_bf16, plus bias.
  int64_t n = 0;
  const float* bias = nullptr;  // [n] or null
  void* out = nullptr;          // row 0 of the group
  bool out_bf16 = false;
  int64_t out_ld = 0;
  // Epilogue of matmul_best: best[r] of the item's row r and the item's columns below n. No bias.
  Best* best = nullptr;
  // Epilogue of mlp_up: silu(gate) * up as rows of [rows, width], packed for weights of
  // `down_format`. Panels come in pairs (gate, up); where down is quantised, panel_begin is a
  // multiple of kActGroupPanels.
  int64_t width = 0;
  WeightFormat down_format = {};
  void* packed_out = nullptr;
};
// Panels of gate and up that make one group of the hidden row.
constexpr int64_t kActGroupPanels = 2 * kActGroup / kPanelColumns;

// Rows of one sequence x one kv head x the splits [split_begin, split_end) of its positions. A
// query is one (row, head of the group); query i of an item is row i / group, head i % group. Every
// split gives an independent (accumulator, max, sum); they merge in ascending order.
struct AttentionItem {
  const float* q = nullptr;  // [rows, num_heads, head_dim], the item's first row
  int64_t rows = 0;
  int64_t start_position = 0;  // of the first row
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0, block_size = 0;
  int64_t kv_head = 0;
  bool bf16 = false;  // the cache's element type
  // The cache: block b at kv + b * block_bytes: keys [kv_head][head_dim][block_size], values
  // [kv_head][block_size][head_dim].
  const void* kv = nullptr;
  size_t block_bytes = 0;
  const int32_t* block_table = nullptr;
  float scale = 1.0f;
  int64_t split_begin = 0, split_end = 0;
  float* state = nullptr;    // [queries][AttentionStateFloats]: accumulator, max, sum
  float* scratch = nullptr;  // the same size
};
SY_SHARED constexpr int64_t AttentionStateFloats(int64_t head_dim) { return head_dim + 2; }
// The first row of an item that sees a split.
SY_SHARED constexpr int64_t FirstRowOfSplit(int64_t start_position, int64_t split) {
  const int64_t row = split * kAttentionSplit - start_position;
  return row > 0 ? row : 0;
}

// Half-split rotary pairs (i, i + half) of `heads` heads.
struct RopeShape {
  int64_t heads = 0, head_dim = 0, half = 0;
};

struct LogitStats {
  float max;
  bool finite;  // no NaN, no +inf, and something above -inf
};

struct KernelTable {
  const char* name;
  int (*max_rows)(WeightFormat format);  // of a block, where a product reads it
  // Bytes of one packed row of k elements.
  size_t (*packed_row_bytes)(int64_t k, WeightFormat format);
  // Panels that the tiles of a group of `rows` take at once: items should hold a multiple.
  int (*panels_for_rows)(int64_t rows, int block_rows);
  void (*pack_rows)(const PackRowsItem&);
  // w [count][16]: `count` inputs of 16 columns, those that share a scale; codes the same shape, so
  // that weight = scale * (code - zero), zero = 128 (kInt8) or 8 (kInt4); halves [16]: the scales
  // as float16 bits, NaN (and codes 0) where a weight is not finite. kInt8: max |w| / 127. kInt4:
  // the one of several scales around max |w| / 8 with the least sum of squared errors; it may be
  // negative, so that the largest weight has the code 0.
  void (*quantize_weights)(const float* w, int64_t count, WeightType type, uint16_t* halves,
                           uint8_t* codes);
  void (*matmul)(const MatmulItem&);
  void (*matmul_best)(const MatmulItem&);
  void (*mlp_up)(const MatmulItem&);

  // Fills item.state for the queries that see the splits.
  void (*attention)(const AttentionItem&);
  // Merges `from` [queries][state], which holds `split`, into item.state.
  void (*attention_merge)(const AttentionItem&, int64_t split, const float* from);
  // out[row][head][head_dim] of the item's heads = accumulator / sum; out is at the item's first
  // row.
  void (*attention_output)(const AttentionItem&, void* out, bool out_bf16);

  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, void* out,
                   bool out_bf16);
  void (*rope)(float* x, const float* cos, const float* sin, const RopeShape&);
  void (*narrow)(const float* x, int64_t n, uint16_t* out);
  void (*widen)(const uint16_t* x, int64_t n, float* out);
  void (*sigmoid)(float* x, int64_t n);
  // sum += weight * x
  void (*accumulate)(const void* x, bool bf16, float weight, int64_t n, float* sum);

  LogitStats (*logit_stats)(const float* x, int64_t n);
  // Sum of e^((x[i] - max) * scale) in a fixed order; the terms go to `out` unless it is null.
  double (*exp_sum)(const float* x, int64_t n, float max, float scale, float* out);
};

}  // namespace switchyard::cpu

namespace switchyard::cpu_avx512 {
const cpu::KernelTable& Table();
}
namespace switchyard::cpu_avx2 {
const cpu::KernelTable& Table();
}
namespace switchyard::cpu_portable {
const cpu::KernelTable& Table();
}
