// CpuBackend: ComputeBackend on the host's cores. It checks shapes, cuts ops into work items and
// hands them to the pool; the arithmetic is in the KernelTable of one instruction path. Used by its
// owner thread only; every call returns when it is done. Scratch that was not reserved grows to
// a high-water mark and is kept.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/matmul_plan.h"
#include "kernels/cpu/task_list.h"
#include "kernels/mutex.h"
#include "kernels/thread_pool.h"

namespace switchyard::cpu {

class CpuBackend final : public ComputeBackend {
 public:
  CpuBackend(ThreadPool* pool, const KernelTable* kernels);

  std::string numerics_id() const override;
  ScratchBytes MaxScratch(const ScratchLimits& limits) const override;
  void Reserve(const ScratchLimits& limits) override;
  // Held now, of MaxScratch().backend.
  size_t scratch_bytes() const {
    return packed_rows_.bytes() + packed_hidden_.bytes() + attention_states_.bytes();
  }
  PackedMatrix Pack(const Tensor& weight, const WeightFormat& format) override;
  PackedMatrix Pack(const QuantizedTensor& weight) override;
  MlpWeights PackMlp(const Tensor& gate, const Tensor& up, const Tensor& down,
                     const WeightFormat& format) override;
  MlpWeights PackMlp(const QuantizedTensor& gate, const QuantizedTensor& up,
                     const QuantizedTensor& down) override;
  MlpWeights MakeMlp(int64_t width, int64_t hidden, const WeightFormat& format) override;
  size_t PackedBytes(int64_t n, int64_t k, const WeightFormat& format) const override;
  void Embed(const Tensor& table, std::span<const int32_t> ids, const Tensor& out) override;
  void RmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) override;
  using ComputeBackend::Matmul;
  void Matmul(const Tensor& x, std::span<const Product> products) override;
  void Rope(const Tensor& x, const Tensor& cos, const Tensor& sin,
            std::span<const int32_t> positions) override;
  size_t KvBlockBytes(const KvCacheShape& shape) const override;
  void WriteKv(const Tensor& k, const Tensor& v, const KvCacheShape& shape,
               std::span<const SequenceRows> sequences, const Tensor& kv) override;
  void Attention(const AttentionArgs& args) override;
  void GroupedMlp(const Tensor& x, std::span<const MlpGroup> groups, const Tensor& out) override;
  void Combine(const CombineArgs& args) override;
  void Add(const Tensor& x, const Tensor& residual) override;
  void Sigmoid(const Tensor& x) override;
  void Sample(const Tensor& logits, std::span<const SamplingRow> rows,
              std::span<SampledToken> out) override;
  void MatmulArgmax(const Tensor& x, const PackedMatrix& w, std::span<SampledToken> out) override;
  void Score(const Tensor& logits, std::span<const int32_t> target, int32_t num_top,
             std::span<SampledToken> out) override;
  void Synchronize() override {}

 private:
  // A block of rows to be packed.
  struct RowBlock {
    int32_t group = 0;
    int64_t first_row = 0;  // in x
    int64_t rows = 0;
    std::byte* out = nullptr;
  };
  // Bytes of each scratch buffer.
  struct ScratchNeeds {
    size_t rows = 0;
    size_t hidden = 0;
    size_t attention = 0;
  };
  // Where a group's packed rows begin.
  struct GroupScratch {
    std::byte* x = nullptr;
    std::byte* hidden = nullptr;
  };
  // Rows of one sequence that one work item of attention takes, for one kv head.
  struct AttentionUnit {
    const SequenceRows* sequence = nullptr;
    int64_t row = 0;  // within the sequence
    int64_t rows = 0;
    int64_t kv_head = 0;
    int64_t splits = 0;
    size_t state = 0;  // floats: its offset when splits are shared out, [splits][queries][state]
  };
  struct SplitItem {
    size_t unit = 0;
    int64_t split = 0;
  };

  // Runs fn(i) for i in [0, n): on the pool if the `macs` (multiply-adds or as much other work) are
  // worth it.
  template <typename Fn>
  void Run(int64_t n, int64_t macs, const Fn& fn) {
    if (n == 1 || macs < kInlineMacs) {
      for (int64_t i = 0; i < n; ++i) fn(i);
    } else {
      pool_->ParallelFor(n, std::function<void(int64_t)>(std::cref(fn)));
    }
  }
  // Runs fn(task, next): `next` is the task that this thread will probably get afterwards, as
  // threads take turns, or null.
  template <typename Fn>
  void RunTasks(int64_t macs, const Fn& fn) {
    const int64_t turn = macs < kInlineMacs ? 1 : pool_->num_threads();
    Run(tasks_.size(), macs, [&](int64_t i) {
      tasks_.Run(i, [&](const TaskList::Task& task) { fn(task, tasks_.Find(i + turn)); });
    });
  }
  // fn(row) for every row, in chunks.
  template <typename Fn>
  void RunRows(int64_t rows, int64_t macs_per_row, const Fn& fn) {
    const int64_t per_item =
        std::max<int64_t>(1, (kInlineMacs / 4) / std::max<int64_t>(1, macs_per_row));
    const int64_t items = (rows + per_item - 1) / per_item;
    Run(items, rows * macs_per_row, [&](int64_t item) {
      const int64_t end = std::min(rows, (item + 1) * per_item);
      for (int64_t r = item * per_item; r < end; ++r) fn(r);
    });
  }

  // Products of weights of one format. Unless `best` is null there is one, which is not stored:
  // best[row], kNoBest before the call, becomes that of the row.
  void RunProducts(const Tensor& x, std::span<const Product> products, Best* best);
  // Queues the blocks of rows [first, first + rows) for packing at `out`.
  void AddBlocks(int32_t group, int64_t first, int64_t rows, int block_rows, size_t row_bytes,
                 std::byte* out);
  int BlockRows(const MlpWeights& w) const;
  void PackBlock(const Tensor& x, const RowBlock& block, const WeightFormat& format) const;
  void PlanMlp(std::span<const MlpGroup> groups, int64_t hidden);  // fills tasks_
  void RunMlpItem(const WorkItem& work, const MlpGroup& group, bool up, const std::byte* next_w,
                  const Tensor& out) const;
  ScratchNeeds NeedsOf(const ScratchLimits& limits) const;
  static std::byte* Scratch(Buffer* buffer, size_t bytes);
  static size_t MaxThreadStateBytes(const ScratchLimits& limits);
  AttentionItem MakeItem(const AttentionArgs& args, const AttentionUnit& unit) const;
  void WriteOutput(const AttentionArgs& args, const AttentionUnit& unit,
                   const AttentionItem& item) const;
  size_t MaxSplitStateFloats(const ScratchLimits& limits) const;
  int64_t PlanAttention(const AttentionArgs& args);  // fills units_; returns multiply-adds
  void AttendByUnit(const AttentionArgs& args, int64_t macs);
  void AttendBySplit(const AttentionArgs& args, int64_t macs);

  ThreadPool* const pool_;
  const KernelTable* const kernels_;
  // Scratch, kept between calls.
  Buffer packed_rows_;
  Buffer packed_hidden_;
  Buffer attention_states_;
  std::vector<RowBlock> blocks_;
  std::vector<GroupScratch> group_scratch_;
  std::vector<GroupShape> shapes_;
  std::vector<WorkItem> items_;
  std::vector<WorkItem> up_items_;
  std::vector<Best> best_;  // of rows
  Mutex best_mu_;           // while RunProducts fills it
  TaskList tasks_;
  std::vector<AttentionUnit> units_;
  std::vector<SplitItem> split_items_;
};

}  // namespace switchyard::cpu
