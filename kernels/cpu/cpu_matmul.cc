// CpuBackend: matrix products, plain and grouped.
#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/float_mode.h"

namespace switchyard::cpu {

namespace {

// Whether x may be multiplied by weights of this format.
bool Accepts(const WeightFormat& format, DType x) {
  return IsQuantized(format) ? x != DType::kI32 : format == FormatOf(x);
}

}  // namespace

void CpuBackend::AddBlocks(int64_t first, int64_t rows, int64_t k, const WeightFormat& format,
                           std::byte* out) {
  const size_t row_bytes = kernels_->packed_row_bytes(k, format);
  const int64_t num_blocks = NumBlocks(rows, kernels_->max_rows);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t begin = BlockBegin(rows, num_blocks, b);
    blocks_.push_back({.first_row = first + begin,
                       .rows = BlockBegin(rows, num_blocks, b + 1) - begin,
                       .format = format,
                       .out = out + static_cast<size_t>(begin) * row_bytes});
  }
}

void CpuBackend::PackBlocks(const Tensor& x) {
  const int64_t k = x.dim(1);
  Run(static_cast<int64_t>(blocks_.size()), x.dim(0) * k, [&](int64_t i) {
    const RowBlock& b = blocks_[static_cast<size_t>(i)];
    kernels_->pack_rows({.x = static_cast<const std::byte*>(x.data) +
                              static_cast<size_t>(b.first_row * k) * DTypeSize(x.dtype),
                         .bf16 = x.dtype == DType::kBF16,
                         .ld = k,
                         .rows = b.rows,
                         .k = k,
                         .format = b.format,
                         .out = b.out});
  });
}

void CpuBackend::Matmul(const Tensor& x, const PackedMatrix& w, const float* bias,
                        const Tensor& out) {
  const FlushDenormals flush;
  const int64_t rows = x.dim(0);
  SY_CHECK_EQ(x.ndim, 2);
  SY_CHECK_EQ(x.dim(1), w.k);
  SY_CHECK(Accepts(w.format, x.dtype));
  SY_CHECK_EQ(out.dim(0), rows);
  SY_CHECK_EQ(out.dim(1), w.n);
  SY_CHECK(out.dtype == DType::kF32 || out.dtype == DType::kBF16);
  if (rows == 0) return;
  std::byte* packed =
      Scratch(&packed_rows_, static_cast<size_t>(rows) * kernels_->packed_row_bytes(w.k, w.format));
  blocks_.clear();
  AddBlocks(0, rows, w.k, w.format, packed);
  PackBlocks(x);

  const int64_t num_panels = NumPanels(w.n);
  shapes_.assign(1, {.rows = rows, .panels = num_panels, .k = w.k});
  PlanItems(*kernels_, shapes_, pool_->num_threads(), &items_);
  Run(static_cast<int64_t>(items_.size()), rows * w.n * w.k, [&](int64_t i) {
    const WorkItem& item = items_[static_cast<size_t>(i)];
    kernels_->matmul({.x = packed,
                      .rows = rows,
                      .block_begin = item.block_begin,
                      .block_end = item.block_end,
                      .w = w.storage.data(),
                      .num_panels = num_panels,
                      .k = w.k,
                      .format = w.format,
                      .panel_begin = item.panel_begin,
                      .panel_end = item.panel_end,
                      .n = w.n,
                      .bias = bias,
                      .out = out.data,
                      .out_bf16 = out.dtype == DType::kBF16,
                      .out_ld = w.n});
  });
}

void CpuBackend::GroupedMlp(const Tensor& x, std::span<const MlpGroup> groups, const Tensor& out) {
  const FlushDenormals flush;
  const int64_t hidden = x.dim(1);
  SY_CHECK_EQ(x.ndim, 2);
  SY_CHECK_EQ(out.dim(0), x.dim(0));
  SY_CHECK_EQ(out.dim(1), hidden);
  SY_CHECK(out.dtype == x.dtype);

  // Where each group's packed rows begin: x at offsets[g].x, the gated hidden rows at
  // offsets[g].hidden.
  group_offsets_.clear();
  size_t x_bytes = 0, hidden_bytes = 0;
  int64_t macs = 0;
  for (const MlpGroup& g : groups) {
    SY_CHECK_LE(0, g.begin);
    SY_CHECK_LE(g.begin, g.end);
    SY_CHECK_LE(g.end, x.dim(0));
    SY_CHECK_EQ(g.weights->gate_up.k, hidden);
    SY_CHECK_EQ(g.weights->down.n, hidden);
    SY_CHECK(Accepts(g.weights->gate_up.format, x.dtype));
    SY_CHECK(Accepts(g.weights->down.format, x.dtype));
    group_offsets_.push_back({.x = x_bytes, .hidden = hidden_bytes});
    const size_t rows = static_cast<size_t>(g.end - g.begin);
    x_bytes += rows * kernels_->packed_row_bytes(hidden, g.weights->gate_up.format);
    hidden_bytes += rows * kernels_->packed_row_bytes(g.weights->width, g.weights->down.format);
    macs += (g.end - g.begin) * g.weights->width * hidden;
  }
  std::byte* packed_x = Scratch(&packed_rows_, x_bytes);
  std::byte* packed_hidden = Scratch(&packed_hidden_, hidden_bytes);
  blocks_.clear();
  for (size_t g = 0; g < groups.size(); ++g) {
    AddBlocks(groups[g].begin, groups[g].end - groups[g].begin, hidden,
              groups[g].weights->gate_up.format, packed_x + group_offsets_[g].x);
  }
  PackBlocks(x);

  const auto item_of = [&](const WorkItem& item, const PackedMatrix& w, std::byte* rows) {
    const MlpGroup& g = groups[static_cast<size_t>(item.group)];
    const int64_t num_panels = shapes_[static_cast<size_t>(item.group)].panels;
    return MatmulItem{.x = rows,
                      .rows = g.end - g.begin,
                      .block_begin = item.block_begin,
                      .block_end = item.block_end,
                      .w = w.storage.data(),
                      .num_panels = num_panels,
                      .k = w.k,
                      .format = w.format,
                      .panel_begin = item.panel_begin,
                      .panel_end = item.panel_end};
  };

  shapes_.clear();
  for (const MlpGroup& g : groups)
    shapes_.push_back(
        {.rows = g.end - g.begin,
         .panels = 2 * NumPanels(g.weights->width),
         .k = hidden,
         .panel_multiple = IsQuantized(g.weights->down.format) ? kActGroupPanels : 2});
  PlanItems(*kernels_, shapes_, pool_->num_threads(), &items_);
  Run(static_cast<int64_t>(items_.size()), 2 * macs, [&](int64_t i) {
    const WorkItem& work = items_[static_cast<size_t>(i)];
    const size_t g = static_cast<size_t>(work.group);
    MatmulItem item = item_of(work, groups[g].weights->gate_up, packed_x + group_offsets_[g].x);
    item.width = groups[g].weights->width;
    item.down_format = groups[g].weights->down.format;
    item.packed_out = packed_hidden + group_offsets_[g].hidden;
    kernels_->mlp_up(item);
  });

  shapes_.clear();
  for (const MlpGroup& g : groups)
    shapes_.push_back(
        {.rows = g.end - g.begin, .panels = NumPanels(hidden), .k = g.weights->width});
  PlanItems(*kernels_, shapes_, pool_->num_threads(), &items_);
  Run(static_cast<int64_t>(items_.size()), macs, [&](int64_t i) {
    const WorkItem& work = items_[static_cast<size_t>(i)];
    const size_t g = static_cast<size_t>(work.group);
    MatmulItem item =
        item_of(work, groups[g].weights->down, packed_hidden + group_offsets_[g].hidden);
    item.n = hidden;
    item.out = static_cast<std::byte*>(out.data) +
               static_cast<size_t>(groups[g].begin * hidden) * DTypeSize(out.dtype);
    item.out_bf16 = out.dtype == DType::kBF16;
    item.out_ld = hidden;
    kernels_->matmul(item);
  });
}

}  // namespace switchyard::cpu
