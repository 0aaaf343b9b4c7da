// CpuBackend: matrix products, plain and grouped.
#include <algorithm>
#include <array>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/float_mode.h"

namespace switchyard::cpu {

namespace {

enum TaskKind { kPackRows, kProduct, kUp, kDown };

// Whether x may be multiplied by weights of this format.
bool Accepts(const WeightFormat& format, DType x) {
  return IsQuantized(format) ? x != DType::kI32 : format == FormatOf(x);
}

// In any order.
void Merge(const Best& part, Best* row) {
  const bool legal = row->legal && part.legal;
  const bool first = part.logit == row->logit && part.column < row->column;
  if (part.logit > row->logit || first) *row = part;
  row->legal = legal;
}

// Where the weights of a panel begin.
const std::byte* PanelData(const PackedMatrix& w, int64_t panel) {
  return w.storage.data() + SlabBegin(panel, w.k, w.format);
}

}  // namespace

void CpuBackend::AddBlocks(int32_t group, int64_t first, int64_t rows, int block_rows,
                           size_t row_bytes, std::byte* out) {
  const int64_t num_blocks = NumBlocks(rows, block_rows);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t begin = BlockBegin(rows, num_blocks, b);
    blocks_.push_back({.group = group,
                       .first_row = first + begin,
                       .rows = BlockBegin(rows, num_blocks, b + 1) - begin,
                       .out = out + static_cast<size_t>(begin) * row_bytes});
  }
}

void CpuBackend::PackBlock(const Tensor& x, const RowBlock& block,
                           const WeightFormat& format) const {
  const int64_t k = x.dim(1);
  kernels_->pack_rows({.x = static_cast<const std::byte*>(x.data) +
                            static_cast<size_t>(block.first_row * k) * DTypeSize(x.dtype),
                       .bf16 = x.dtype == DType::kBF16,
                       .ld = k,
                       .rows = block.rows,
                       .k = k,
                       .format = format,
                       .out = block.out});
}

void CpuBackend::Matmul(const Tensor& x, std::span<const Product> products) {
  const FlushDenormals flush;
  SY_CHECK_EQ(x.ndim, 2);
  for (const Product& p : products) {
    SY_CHECK_EQ(x.dim(1), p.w->k);
    SY_CHECK(Accepts(p.w->format, x.dtype));
    SY_CHECK_EQ(p.out.dim(0), x.dim(0));
    SY_CHECK_EQ(p.out.dim(1), p.w->n);
    SY_CHECK(p.out.dtype == DType::kF32 || p.out.dtype == DType::kBF16);
  }
  if (x.dim(0) == 0) return;
  while (!products.empty()) {
    const auto other = std::ranges::find_if(
        products, [&](const Product& p) { return p.w->format != products.front().w->format; });
    const auto count = static_cast<size_t>(other - products.begin());
    RunProducts(x, products.first(count), nullptr);
    products = products.subspan(count);
  }
}

void CpuBackend::MatmulArgmax(const Tensor& x, const PackedMatrix& w, std::span<SampledToken> out) {
  const FlushDenormals flush;
  SY_CHECK_EQ(x.ndim, 2);
  SY_CHECK_EQ(x.dim(1), w.k);
  SY_CHECK(Accepts(w.format, x.dtype));
  SY_CHECK_EQ(x.dim(0), static_cast<int64_t>(out.size()));
  if (out.empty()) return;
  best_.assign(out.size(), kNoBest);
  const Product product{.w = &w, .bias = nullptr, .out = {}};
  RunProducts(x, {&product, 1}, best_.data());
  for (size_t r = 0; r < out.size(); ++r) {
    const bool finite = best_[r].legal && best_[r].column >= 0;
    out[r] = {.token = finite ? best_[r].column : -1, .finite = finite, .logprob = 0.0f, .top = {}};
  }
}

void CpuBackend::RunProducts(const Tensor& x, std::span<const Product> products, Best* best) {
  const int64_t rows = x.dim(0);
  const int64_t k = x.dim(1);
  const WeightFormat& format = products.front().w->format;
  const int block_rows = kernels_->max_rows(format);
  const size_t row_bytes = kernels_->packed_row_bytes(k, format);
  std::byte* packed = Scratch(&packed_rows_, static_cast<size_t>(rows) * row_bytes);
  blocks_.clear();
  AddBlocks(0, 0, rows, block_rows, row_bytes, packed);
  shapes_.clear();
  int64_t macs = 0;
  for (const Product& p : products) {
    shapes_.push_back(
        {.rows = rows, .panels = NumPanels(p.w->n), .k = k, .block_rows = block_rows});
    macs += rows * p.w->n * k;
  }
  PlanItems(*kernels_, shapes_, pool_->num_threads(), &items_);
  tasks_.Reset(1);
  for (size_t b = 0; b < blocks_.size(); ++b)
    tasks_.Add({.kind = kPackRows, .index = static_cast<int32_t>(b), .serves = 0});
  for (size_t i = 0; i < items_.size(); ++i)
    tasks_.Add({.kind = kProduct, .index = static_cast<int32_t>(i), .needs = 0});

  RunTasks(macs, [&](const TaskList::Task& task, const TaskList::Task* next) {
    const size_t index = static_cast<size_t>(task.index);
    if (task.kind == kPackRows) return PackBlock(x, blocks_[index], format);
    const WorkItem& item = items_[index];
    const std::byte* next_w = nullptr;
    if (next != nullptr && next->kind == kProduct) {
      const WorkItem& n = items_[static_cast<size_t>(next->index)];
      next_w = PanelData(*products[static_cast<size_t>(n.group)].w, n.panel_begin);
    }
    const Product& p = products[static_cast<size_t>(item.group)];
    MatmulItem args{.x = packed,
                    .rows = rows,
                    .block_rows = block_rows,
                    .block_begin = item.block_begin,
                    .block_end = item.block_end,
                    .w = p.w->storage.data(),
                    .num_panels = NumPanels(p.w->n),
                    .k = k,
                    .format = format,
                    .panel_begin = item.panel_begin,
                    .panel_end = item.panel_end,
                    .next_w = next_w,
                    .n = p.w->n,
                    .bias = p.bias,
                    .out = p.out.data,
                    .out_bf16 = p.out.dtype == DType::kBF16,
                    .out_ld = p.w->n};
    if (best == nullptr) return kernels_->matmul(args);
    std::array<Best, kMaxItemTiles> part;  // rows are fewer
    args.best = part.data();
    kernels_->matmul_best(args);
    const int64_t num_blocks = NumBlocks(rows, block_rows);
    const int64_t first = BlockBegin(rows, num_blocks, item.block_begin);
    const int64_t end = BlockBegin(rows, num_blocks, item.block_end);
    const MutexLock lock(best_mu_);
    for (int64_t r = first; r < end; ++r) Merge(part[static_cast<size_t>(r - first)], &best[r]);
  });
}

// Both products of an MLP read blocks of the same rows.
int CpuBackend::BlockRows(const MlpWeights& w) const {
  return std::min(kernels_->max_rows(w.gate_up.format), kernels_->max_rows(w.down.format));
}

// Of GroupedMlp. Each group has two stages: its rows are packed, its hidden rows are there. Down
// follows one group behind up, so that nobody waits for hidden rows unless there is nothing else.
void CpuBackend::PlanMlp(std::span<const MlpGroup> groups, int64_t hidden) {
  shapes_.clear();
  for (const MlpGroup& g : groups)
    shapes_.push_back(
        {.rows = g.end - g.begin,
         .panels = 2 * NumPanels(g.weights->width),
         .k = hidden,
         .block_rows = BlockRows(*g.weights),
         .panel_multiple = IsQuantized(g.weights->down.format) ? kActGroupPanels : 2});
  PlanItems(*kernels_, shapes_, pool_->num_threads(), &up_items_);
  for (size_t g = 0; g < groups.size(); ++g) {
    shapes_[g] = {.rows = groups[g].end - groups[g].begin,
                  .panels = NumPanels(hidden),
                  .k = groups[g].weights->width,
                  .block_rows = BlockRows(*groups[g].weights)};
  }
  PlanItems(*kernels_, shapes_, pool_->num_threads(), &items_);

  tasks_.Reset(2 * static_cast<int32_t>(groups.size()));
  for (size_t b = 0; b < blocks_.size(); ++b) {
    tasks_.Add(
        {.kind = kPackRows, .index = static_cast<int32_t>(b), .serves = 2 * blocks_[b].group});
  }
  size_t up = 0, down = 0;
  for (int32_t g = 0; g <= static_cast<int32_t>(groups.size()); ++g) {
    for (; up < up_items_.size() && up_items_[up].group == g; ++up) {
      tasks_.Add(
          {.kind = kUp, .index = static_cast<int32_t>(up), .needs = 2 * g, .serves = 2 * g + 1});
    }
    for (; down < items_.size() && items_[down].group < g; ++down) {
      tasks_.Add({.kind = kDown,
                  .index = static_cast<int32_t>(down),
                  .needs = 2 * items_[down].group + 1});
    }
  }
}

void CpuBackend::RunMlpItem(const WorkItem& work, const MlpGroup& group, bool up,
                            const std::byte* next_w, const Tensor& out) const {
  const PackedMatrix& w = up ? group.weights->gate_up : group.weights->down;
  const GroupScratch& scratch = group_scratch_[static_cast<size_t>(work.group)];
  const int64_t hidden = out.dim(1);
  MatmulItem item{.x = up ? scratch.x : scratch.hidden,
                  .rows = group.end - group.begin,
                  .block_rows = BlockRows(*group.weights),
                  .block_begin = work.block_begin,
                  .block_end = work.block_end,
                  .w = w.storage.data(),
                  .num_panels = up ? 2 * NumPanels(group.weights->width) : NumPanels(hidden),
                  .k = w.k,
                  .format = w.format,
                  .panel_begin = work.panel_begin,
                  .panel_end = work.panel_end,
                  .next_w = next_w};
  if (up) {
    item.width = group.weights->width;
    item.down_format = group.weights->down.format;
    item.packed_out = scratch.hidden;
    kernels_->mlp_up(item);
  } else {
    item.n = hidden;
    item.out = static_cast<std::byte*>(out.data) +
               static_cast<size_t>(group.begin * hidden) * DTypeSize(out.dtype);
    item.out_bf16 = out.dtype == DType::kBF16;
    item.out_ld = hidden;
    kernels_->matmul(item);
  }
}

void CpuBackend::GroupedMlp(const Tensor& x, std::span<const MlpGroup> groups, const Tensor& out) {
  const FlushDenormals flush;
  const int64_t hidden = x.dim(1);
  SY_CHECK_EQ(x.ndim, 2);
  SY_CHECK_EQ(out.dim(0), x.dim(0));
  SY_CHECK_EQ(out.dim(1), hidden);
  SY_CHECK(out.dtype == x.dtype);

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
    const size_t rows = static_cast<size_t>(g.end - g.begin);
    x_bytes += rows * kernels_->packed_row_bytes(hidden, g.weights->gate_up.format);
    hidden_bytes += rows * kernels_->packed_row_bytes(g.weights->width, g.weights->down.format);
    macs += 3 * (g.end - g.begin) * g.weights->width * hidden;
  }
  std::byte* next_x = Scratch(&packed_rows_, x_bytes);
  std::byte* next_hidden = Scratch(&packed_hidden_, hidden_bytes);
  blocks_.clear();
  group_scratch_.clear();
  for (const MlpGroup& g : groups) {
    const size_t row_bytes = kernels_->packed_row_bytes(hidden, g.weights->gate_up.format);
    AddBlocks(static_cast<int32_t>(group_scratch_.size()), g.begin, g.end - g.begin,
              BlockRows(*g.weights), row_bytes, next_x);
    group_scratch_.push_back({.x = next_x, .hidden = next_hidden});
    const size_t rows = static_cast<size_t>(g.end - g.begin);
    next_x += rows * row_bytes;
    next_hidden += rows * kernels_->packed_row_bytes(g.weights->width, g.weights->down.format);
  }
  PlanMlp(groups, hidden);
  const auto work_of = [&](const TaskList::Task& task) -> const WorkItem& {
    return (task.kind == kUp ? up_items_ : items_)[static_cast<size_t>(task.index)];
  };
  RunTasks(macs, [&](const TaskList::Task& task, const TaskList::Task* next) {
    const size_t index = static_cast<size_t>(task.index);
    if (task.kind == kPackRows) {
      const RowBlock& block = blocks_[index];
      const MlpGroup& group = groups[static_cast<size_t>(block.group)];
      return PackBlock(x, block, group.weights->gate_up.format);
    }
    const std::byte* next_w = nullptr;
    if (next != nullptr && next->kind != kPackRows) {
      const WorkItem& n = work_of(*next);
      const MlpWeights& weights = *groups[static_cast<size_t>(n.group)].weights;
      next_w = PanelData(next->kind == kUp ? weights.gate_up : weights.down, n.panel_begin);
    }
    const WorkItem& work = work_of(task);
    RunMlpItem(work, groups[static_cast<size_t>(work.group)], task.kind == kUp, next_w, out);
  });
}

}  // namespace switchyard::cpu
