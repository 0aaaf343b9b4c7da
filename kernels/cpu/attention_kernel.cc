// Paged causal attention. A key's score is one sequential sum over head_dim; a split's maximum, sum
// and accumulator have one fixed order over its 256 positions. Keys that a query must not see are
// never added.
#include "kernels/cpu/kernels.h"

namespace switchyard::SY_CPU_PATH {
namespace {

using cpu::AttentionItem;
using cpu::kAttentionSplit;

constexpr float kMinusInfinity = -__builtin_inff();

int64_t Group(const AttentionItem& item) { return item.num_heads / item.num_kv_heads; }
int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// Keys of `split` that the item's row sees.
int64_t KeysSeen(const AttentionItem& item, int64_t split, int64_t row) {
  return Min(kAttentionSplit, item.start_position + row + 1 - split * kAttentionSplit);
}

template <typename T>
const T* KeyBlock(const AttentionItem& item, int64_t block) {
  const char* base = static_cast<const char*>(item.kv) +
                     static_cast<size_t>(item.block_table[block]) * item.block_bytes;
  return reinterpret_cast<const T*>(base) + item.kv_head * item.head_dim * item.block_size;
}
template <typename T>
const T* ValueBlock(const AttentionItem& item, int64_t block) {
  return KeyBlock<T>(item, block) + item.num_kv_heads * item.head_dim * item.block_size;
}

constexpr int kMaxQueries = kMaxRows < 8 ? kMaxRows : 8;  // of a register tile

// A register tile of queries.
template <typename T>
struct QueryTile {
  const float* q[kMaxQueries];
  int64_t keys[kMaxQueries];  // seen in this split; ascending
  float* state[kMaxQueries];
  int64_t size = 0;
  float p[kMaxQueries][kAttentionSplit];  // scores, then probabilities
};

// Scores of G groups of keys.
template <typename T, int R, int G, bool kWhole>
void ScoreTile(const AttentionItem& item, QueryTile<T>& tile, int64_t key, int64_t keys_per_group,
               int64_t split) {
  const T* k[G];
  for (int g = 0; g < G; ++g) {
    const int64_t position = split * kAttentionSplit + key + g * keys_per_group;
    k[g] = KeyBlock<T>(item, position / item.block_size) + position % item.block_size;
  }
  F16 acc[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) acc[r][g] = Zero();
  for (int64_t d = 0; d < item.head_dim; ++d) {
    for (int g = 0; g < G; ++g) {
      const F16 kv = kWhole ? LoadAs(k[g] + d * item.block_size)
                            : LoadSome(k[g] + d * item.block_size, keys_per_group);
      for (int r = 0; r < R; ++r) acc[r][g] = Fma(Splat(tile.q[r][d]), kv, acc[r][g]);
    }
  }
  const F16 scale = Splat(item.scale);
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g)
      StoreSome(tile.p[r] + key + g * keys_per_group, Mul(acc[r][g], scale), keys_per_group);
}

template <typename T, int R, bool kWhole>
void ScoreRows(const AttentionItem& item, QueryTile<T>& tile, int64_t split,
               int64_t keys_per_group) {
  constexpr int kGroups = PanelsFor(R);
  const int64_t end = tile.keys[R - 1];
  int64_t key = 0;
  for (; key + (kGroups - 1) * keys_per_group < end; key += kGroups * keys_per_group)
    ScoreTile<T, R, kGroups, kWhole>(item, tile, key, keys_per_group, split);
  for (; key < end; key += keys_per_group)
    ScoreTile<T, R, 1, kWhole>(item, tile, key, keys_per_group, split);
}

// Scores to probabilities; sets the state's max and sum.
template <typename T>
void Softmax(const AttentionItem& item, QueryTile<T>& tile, int64_t r) {
  float* p = tile.p[r];
  const int64_t keys = tile.keys[r];
  const int64_t end = (keys + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = keys; i < end; ++i) p[i] = kMinusInfinity;
  F16 max = Splat(kMinusInfinity);
  for (int64_t i = 0; i < end; i += kLanes) max = Max(Load(p + i), max);
  const float m = ReduceMax(max);
  F16 sum = Zero();
  for (int64_t i = 0; i < end; i += kLanes) {
    const F16 e = Exp(Sub(Load(p + i), Splat(m)));
    Store(p + i, e);
    sum = Add(sum, e);
  }
  tile.state[r][item.head_dim] = m;
  tile.state[r][item.head_dim + 1] = ReduceSum(sum);
}

// accumulator[d, d + 16 C) of queries [first, first + R) += probabilities of keys [begin, end) *
// values. `count` is the number of dims when C is 1.
template <typename T, int R, int C>
void ValueTile(const AttentionItem& item, QueryTile<T>& tile, int64_t split, int64_t first,
               int64_t begin, int64_t end, int64_t d, int64_t count) {
  F16 acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      acc[r][c] = begin == 0
                      ? Zero()
                      : LoadSome(tile.state[first + r] + d + c * kLanes, C == 1 ? count : kLanes);
  for (int64_t key = begin; key < end;) {
    const int64_t position = split * kAttentionSplit + key;
    const int64_t offset = position % item.block_size;
    const int64_t stop = Min(end, key + item.block_size - offset);
    const T* v = ValueBlock<T>(item, position / item.block_size) + offset * item.head_dim + d;
    for (; key < stop; ++key, v += item.head_dim) {
      for (int c = 0; c < C; ++c) {
        const F16 value = C == 1 ? LoadSome(v, count) : LoadAs(v + c * kLanes);
        for (int r = 0; r < R; ++r)
          acc[r][c] = Fma(Splat(tile.p[first + r][key]), value, acc[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      StoreSome(tile.state[first + r] + d + c * kLanes, acc[r][c], C == 1 ? count : kLanes);
}

template <typename T, int R>
void ValueRows(const AttentionItem& item, QueryTile<T>& tile, int64_t split, int64_t first,
               int64_t begin, int64_t end) {
  constexpr int kChunks = PanelsFor(R);
  int64_t d = 0;
  for (; d + kChunks * kLanes <= item.head_dim; d += kChunks * kLanes)
    ValueTile<T, R, kChunks>(item, tile, split, first, begin, end, d, kLanes);
  for (; d < item.head_dim; d += kLanes)
    ValueTile<T, R, 1>(item, tile, split, first, begin, end, d, Min(kLanes, item.head_dim - d));
}

template <typename T, int R>
void TileSplit(const AttentionItem& item, QueryTile<T>& tile, int64_t split) {
  if (item.block_size % kLanes == 0) {
    ScoreRows<T, R, true>(item, tile, split, kLanes);
  } else {
    ScoreRows<T, R, false>(item, tile, split, Min(kLanes, item.block_size));
  }
  for (int r = 0; r < R; ++r) Softmax(item, tile, r);
  // Keys that all see, then what each sees alone: a key is never added to a query that must not see
  // it.
  const int64_t common = tile.keys[0];
  ValueRows<T, R>(item, tile, split, 0, 0, common);
  for (int r = 0; r < R; ++r)
    if (tile.keys[r] > common) ValueRows<T, 1>(item, tile, split, r, common, tile.keys[r]);
}

template <typename T, int R = kMaxQueries>
void DispatchTile(const AttentionItem& item, QueryTile<T>& tile, int64_t split) {
  if (tile.size == R) {
    TileSplit<T, R>(item, tile, split);
  } else if constexpr (R > 1) {
    DispatchTile<T, R - 1>(item, tile, split);
  }
}

// One split into `state` for the queries that see it.
template <typename T>
void Split(const AttentionItem& item, int64_t split, float* state) {
  const int64_t group = Group(item);
  const int64_t stride = cpu::AttentionStateFloats(item.head_dim);
  const int64_t begin = cpu::FirstRowOfSplit(item.start_position, split) * group;
  const int64_t end = item.rows * group;
  for (int64_t query = begin; query < end; query += kMaxQueries) {
    QueryTile<T> tile;
    tile.size = Min(kMaxQueries, end - query);
    for (int64_t i = 0; i < tile.size; ++i) {
      const int64_t row = (query + i) / group;
      const int64_t head = item.kv_head * group + (query + i) % group;
      tile.q[i] = item.q + (row * item.num_heads + head) * item.head_dim;
      tile.keys[i] = KeysSeen(item, split, row);
      tile.state[i] = state + (query + i) * stride;
    }
    DispatchTile(item, tile, split);
  }
}

// The one merge: into += from.
void MergeState(float* into, const float* from, int64_t head_dim) {
  const float max_a = into[head_dim];
  const float max_b = from[head_dim];
  const float max = max_b > max_a ? max_b : max_a;
  alignas(64) float scales[kLanes] = {max_a - max, max_b - max};
  Store(scales, Exp(Load(scales)));
  const F16 a = Splat(scales[0]);
  const F16 b = Splat(scales[1]);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int64_t count = Min(kLanes, head_dim - d);
    StoreSome(into + d, Fma(LoadSome(from + d, count), b, Mul(LoadSome(into + d, count), a)),
              count);
  }
  into[head_dim] = max;
  into[head_dim + 1] = into[head_dim + 1] * scales[0] + from[head_dim + 1] * scales[1];
}

template <typename T>
void OutputRows(const AttentionItem& item, T* out) {
  const int64_t group = Group(item);
  const int64_t stride = cpu::AttentionStateFloats(item.head_dim);
  for (int64_t query = 0; query < item.rows * group; ++query) {
    const float* state = item.state + query * stride;
    const F16 sum = Splat(state[item.head_dim + 1]);
    const int64_t head = item.kv_head * group + query % group;
    T* row = out + (query / group * item.num_heads + head) * item.head_dim;
    for (int64_t d = 0; d < item.head_dim; d += kLanes) {
      const int64_t count = Min(kLanes, item.head_dim - d);
      StoreSome(row + d, Div(LoadSome(state + d, count), sum), count);
    }
  }
}

}  // namespace

void AttentionMerge(const AttentionItem& item, int64_t split, const float* from) {
  const int64_t group = Group(item);
  const int64_t stride = cpu::AttentionStateFloats(item.head_dim);
  const int64_t begin = cpu::FirstRowOfSplit(item.start_position, split) * group;
  for (int64_t query = begin; query < item.rows * group; ++query)
    MergeState(item.state + query * stride, from + query * stride, item.head_dim);
}

void Attention(const AttentionItem& item) {
  for (int64_t split = item.split_begin; split < item.split_end; ++split) {
    float* state = split == item.split_begin ? item.state : item.scratch;
    if (item.bf16) {
      Split<uint16_t>(item, split, state);
    } else {
      Split<float>(item, split, state);
    }
    if (split != item.split_begin) AttentionMerge(item, split, item.scratch);
  }
}

void AttentionOutput(const AttentionItem& item, void* out, bool out_bf16) {
  if (out_bf16) {
    OutputRows(item, static_cast<uint16_t*>(out));
  } else {
    OutputRows(item, static_cast<float*>(out));
  }
}

}  // namespace switchyard::SY_CPU_PATH
