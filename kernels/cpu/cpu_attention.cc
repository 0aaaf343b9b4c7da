// CpuBackend: the paged KV cache and attention.
#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/float_mode.h"

namespace switchyard::cpu {
namespace {

constexpr int64_t kQueriesPerItem = 24;  // rows * heads of a group that share a pass over the keys

// Calls with fewer units than this share out their splits as well.
constexpr int64_t kUnitsPerThread = 3;

// Queries of one unit.
int64_t MaxQueries(const ScratchLimits& limits) {
  return std::max(kQueriesPerItem, limits.num_heads / limits.num_kv_heads);
}

void CheckShape(const KvCacheShape& s) {
  SY_CHECK_GE(s.block_size, 1);
  SY_CHECK_EQ(kAttentionSplit % s.block_size, 0);
  SY_CHECK(s.dtype == DType::kF32 || s.dtype == DType::kBF16);
}

// Scatters one row's keys [kv_heads, head_dim] into a block at `offset` and copies its values.
template <typename T, typename Convert>
void WriteRow(const float* k, const float* v, const KvCacheShape& s, int64_t offset, T* block,
              const Convert& convert) {
  T* values = block + static_cast<int64_t>(s.num_kv_heads) * s.head_dim * s.block_size;
  for (int64_t h = 0; h < s.num_kv_heads; ++h) {
    T* key_column = block + h * s.head_dim * s.block_size + offset;
    T* value_row = values + (h * s.block_size + offset) * s.head_dim;
    for (int64_t d = 0; d < s.head_dim; ++d) {
      key_column[d * s.block_size] = convert(k[h * s.head_dim + d]);
      value_row[d] = convert(v[h * s.head_dim + d]);
    }
  }
}

}  // namespace

// Of all units of a call that shares out splits: there are fewer than kUnitsPerThread a thread.
size_t CpuBackend::MaxSplitStateFloats(const ScratchLimits& limits) const {
  if (limits.num_heads == 0) return 0;
  const int64_t queries = std::min(kUnitsPerThread * pool_->num_threads() * MaxQueries(limits),
                                   limits.attention_rows * limits.num_heads);
  const int64_t splits = (limits.max_positions + kAttentionSplit - 1) / kAttentionSplit;
  return static_cast<size_t>(queries * splits * AttentionStateFloats(limits.head_dim));
}

// Two states of one unit; the vector that holds them may have doubled.
size_t CpuBackend::MaxThreadStateBytes(const ScratchLimits& limits) {
  if (limits.num_heads == 0) return 0;
  return static_cast<size_t>(4 * MaxQueries(limits) * AttentionStateFloats(limits.head_dim)) *
         sizeof(float);
}

size_t CpuBackend::KvBlockBytes(const KvCacheShape& s) const {
  CheckShape(s);
  return 2 * static_cast<size_t>(s.num_kv_heads) * static_cast<size_t>(s.head_dim) *
         static_cast<size_t>(s.block_size) * DTypeSize(s.dtype);
}

void CpuBackend::WriteKv(const Tensor& k, const Tensor& v, const KvCacheShape& shape,
                         std::span<const SequenceRows> sequences, const Tensor& kv) {
  const FlushDenormals flush;
  const size_t block_bytes = KvBlockBytes(shape);
  const int64_t width = static_cast<int64_t>(shape.num_kv_heads) * shape.head_dim;
  SY_CHECK_EQ(k.numel(), k.dim(0) * width);
  SY_CHECK_EQ(v.numel(), k.numel());
  SY_CHECK_GE(kv.bytes(), block_bytes * static_cast<size_t>(shape.num_blocks));
  const float* keys = k.as<float>();
  const float* values = v.as<float>();
  for (const SequenceRows& seq : sequences) {
    SY_CHECK_LE(seq.first_row + seq.num_rows, k.dim(0));
    RunRows(seq.num_rows, 4 * width, [&](int64_t i) {
      const int64_t position = seq.start_position + i;
      const size_t entry = static_cast<size_t>(position / shape.block_size);
      SY_CHECK_LT(entry, seq.block_table.size());
      const int32_t block_id = seq.block_table[entry];
      SY_CHECK_GE(block_id, 0);
      SY_CHECK_LT(block_id, shape.num_blocks);
      std::byte* block =
          static_cast<std::byte*>(kv.data) + static_cast<size_t>(block_id) * block_bytes;
      const int64_t row = (seq.first_row + i) * width;
      const int64_t offset = position % shape.block_size;
      if (shape.dtype == DType::kF32) {
        WriteRow(keys + row, values + row, shape, offset, reinterpret_cast<float*>(block),
                 [](float x) { return x; });
      } else {
        WriteRow(keys + row, values + row, shape, offset, reinterpret_cast<bf16*>(block), ToBF16);
      }
    });
  }
}

int64_t CpuBackend::PlanAttention(const AttentionArgs& args) {
  const KvCacheShape& s = args.shape;
  const int64_t group = args.q.dim(1) / s.num_kv_heads;
  const int64_t rows_per_unit = std::max<int64_t>(1, kQueriesPerItem / group);
  int64_t macs = 0;
  units_.clear();
  for (const SequenceRows& seq : args.sequences) {
    SY_CHECK_LE(seq.first_row + seq.num_rows, args.q.dim(0));
    const int64_t end = seq.start_position + seq.num_rows;
    SY_CHECK_LE(end, static_cast<int64_t>(seq.block_table.size()) * s.block_size);
    for (int64_t row = 0; row < seq.num_rows; row += rows_per_unit) {
      const int64_t rows = std::min(rows_per_unit, seq.num_rows - row);
      const int64_t last = seq.start_position + row + rows - 1;
      for (int64_t h = 0; h < s.num_kv_heads; ++h) {
        units_.push_back({.sequence = &seq,
                          .row = row,
                          .rows = rows,
                          .kv_head = h,
                          .splits = last / kAttentionSplit + 1});
      }
      macs += rows * args.q.dim(1) * (last + 1) * s.head_dim * 2;
    }
  }
  return macs;
}

AttentionItem CpuBackend::MakeItem(const AttentionArgs& args, const AttentionUnit& unit) const {
  const KvCacheShape& s = args.shape;
  const int64_t row = unit.sequence->first_row + unit.row;
  return {.q = args.q.as<float>() + row * args.q.dim(1) * s.head_dim,
          .rows = unit.rows,
          .start_position = unit.sequence->start_position + unit.row,
          .num_heads = args.q.dim(1),
          .num_kv_heads = s.num_kv_heads,
          .head_dim = s.head_dim,
          .block_size = s.block_size,
          .kv_head = unit.kv_head,
          .bf16 = s.dtype == DType::kBF16,
          .kv = args.kv->data,
          .block_bytes = KvBlockBytes(s),
          .block_table = unit.sequence->block_table.data(),
          .scale = args.scale,
          .split_begin = 0,
          .split_end = unit.splits};
}

void CpuBackend::WriteOutput(const AttentionArgs& args, const AttentionUnit& unit,
                             const AttentionItem& item) const {
  const size_t row = static_cast<size_t>(unit.sequence->first_row + unit.row);
  const size_t row_bytes = static_cast<size_t>(args.out.dim(1)) * DTypeSize(args.out.dtype);
  kernels_->attention_output(item, static_cast<std::byte*>(args.out.data) + row * row_bytes,
                             args.out.dtype == DType::kBF16);
}

void CpuBackend::AttendByUnit(const AttentionArgs& args, int64_t macs) {
  const int64_t group = args.q.dim(1) / args.shape.num_kv_heads;
  const int64_t state_floats = AttentionStateFloats(args.shape.head_dim);
  Run(static_cast<int64_t>(units_.size()), macs, [&](int64_t i) {
    const AttentionUnit& unit = units_[static_cast<size_t>(i)];
    thread_local std::vector<float> states;
    const size_t floats = static_cast<size_t>(unit.rows * group * state_floats);
    if (states.size() < 2 * floats) states.resize(2 * floats);
    AttentionItem item = MakeItem(args, unit);
    item.state = states.data();
    item.scratch = states.data() + floats;
    kernels_->attention(item);
    WriteOutput(args, unit, item);
  });
}

void CpuBackend::AttendBySplit(const AttentionArgs& args, int64_t macs) {
  const int64_t group = args.q.dim(1) / args.shape.num_kv_heads;
  const int64_t state_floats = AttentionStateFloats(args.shape.head_dim);
  split_items_.clear();
  size_t floats = 0;
  for (size_t u = 0; u < units_.size(); ++u) {
    units_[u].state = floats;
    floats += static_cast<size_t>(units_[u].splits * units_[u].rows * group * state_floats);
    for (int64_t split = 0; split < units_[u].splits; ++split)
      split_items_.push_back({.unit = u, .split = split});
  }
  float* states = reinterpret_cast<float*>(Scratch(&attention_states_, floats * sizeof(float)));
  const auto state_of = [&](const AttentionUnit& unit, int64_t split) {
    return states + unit.state + split * unit.rows * group * state_floats;
  };
  Run(static_cast<int64_t>(split_items_.size()), macs, [&](int64_t i) {
    const auto [u, split] = split_items_[static_cast<size_t>(i)];
    AttentionItem item = MakeItem(args, units_[u]);
    item.split_begin = split;
    item.split_end = split + 1;
    item.state = state_of(units_[u], split);
    kernels_->attention(item);
  });
  Run(static_cast<int64_t>(units_.size()), static_cast<int64_t>(floats), [&](int64_t i) {
    const AttentionUnit& unit = units_[static_cast<size_t>(i)];
    AttentionItem item = MakeItem(args, unit);
    item.state = state_of(unit, 0);
    for (int64_t split = 1; split < unit.splits; ++split)
      kernels_->attention_merge(item, split, state_of(unit, split));
    WriteOutput(args, unit, item);
  });
}

void CpuBackend::Attention(const AttentionArgs& args) {
  const FlushDenormals flush;
  CheckShape(args.shape);
  SY_CHECK_EQ(args.q.ndim, 3);
  SY_CHECK_EQ(args.q.dim(2), args.shape.head_dim);
  SY_CHECK_EQ(args.q.dim(1) % args.shape.num_kv_heads, 0);
  SY_CHECK_EQ(args.out.dim(0), args.q.dim(0));
  SY_CHECK_EQ(args.out.dim(1), args.q.dim(1) * args.q.dim(2));
  SY_CHECK(args.out.dtype == DType::kF32 || args.out.dtype == DType::kBF16);
  const int64_t macs = PlanAttention(args);
  // Few units with long contexts (decode of a small batch): share out the splits as well. The bits
  // are the same.
  const int64_t num_units = static_cast<int64_t>(units_.size());
  const bool by_split = num_units < kUnitsPerThread * pool_->num_threads() &&
                        std::any_of(units_.begin(), units_.end(),
                                    [](const AttentionUnit& u) { return u.splits > 1; });
  if (by_split) {
    AttendBySplit(args, macs);
  } else {
    AttendByUnit(args, macs);
  }
}

}  // namespace switchyard::cpu
