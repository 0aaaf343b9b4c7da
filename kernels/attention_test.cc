// Paged attention against the reference; whole prefill, chunks and decode give the same bits, on
// every path.
#include <numeric>

#include "kernels/test_support.h"

namespace switchyard::testing {
namespace {

using reference::Matrix;

class AttentionTest : public EveryPath {};
SY_EVERY_PATH(AttentionTest);

// A cache with scattered blocks, filled with NaN so that a read past what was written shows.
struct Cache {
  Cache(ComputeBackend& backend, Random& random, const KvCacheShape& s, int64_t positions)
      : shape(s), memory(backend.KvBlockBytes(s) * static_cast<size_t>(s.num_blocks)) {
    std::memset(memory.data(), 0xff, memory.bytes());
    kv = memory.View(DType::kI32, {static_cast<int64_t>(memory.bytes() / 4)});
    table.resize(static_cast<size_t>(s.num_blocks));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), random.engine());
    table.resize(static_cast<size_t>((positions + s.block_size - 1) / s.block_size));
  }
  KvCacheShape shape;
  Buffer memory;
  Tensor kv;
  std::vector<int32_t> table;
};

struct Case {
  int64_t positions;
  int heads, kv_heads, head_dim, block_size;
  DType act;
};

struct Inputs {
  Inputs(Random& random, const Case& c)
      : q(random.Normal(DType::kF32, {c.positions, c.heads, c.head_dim}, 2.0f)),
        k(random.Normal(DType::kF32, {c.positions, c.kv_heads, c.head_dim})),
        v(random.Normal(DType::kF32, {c.positions, c.kv_heads, c.head_dim})) {}
  Guarded q, k, v;
};

KvCacheShape ShapeOf(const Case& c, int extra_blocks) {
  return {.num_blocks =
              static_cast<int>((c.positions + c.block_size - 1) / c.block_size) + extra_blocks,
          .block_size = c.block_size,
          .num_kv_heads = c.kv_heads,
          .head_dim = c.head_dim,
          .dtype = c.act};
}

// Rows [begin, end) as one step: written to the cache, then attended.
void Step(ComputeBackend& backend, const Case& c, const Inputs& in, const Cache& cache,
          int64_t begin, int64_t end, const Tensor& out) {
  const SequenceRows rows = {.block_table = cache.table,
                             .start_position = static_cast<int32_t>(begin),
                             .first_row = 0,
                             .num_rows = static_cast<int32_t>(end - begin)};
  backend.WriteKv(in.k.Rows(begin, end), in.v.Rows(begin, end), cache.shape, {&rows, 1}, cache.kv);
  AttentionArgs args;
  args.q = in.q.Rows(begin, end);
  args.kv = &cache.kv;
  args.shape = cache.shape;
  args.sequences = {&rows, 1};
  args.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  args.out = out;
  backend.Attention(args);
}

Matrix Expected(const Case& c, const Inputs& in) {
  return reference::Attention({.num_heads = c.heads,
                               .num_kv_heads = c.kv_heads,
                               .head_dim = c.head_dim,
                               .scale = 1.0 / std::sqrt(static_cast<double>(c.head_dim))},
                              reference::Widen(in.q.t()),
                              reference::RoundTo(reference::Widen(in.k.t()), c.act),
                              reference::RoundTo(reference::Widen(in.v.t()), c.act), 0);
}

TEST_P(AttentionTest, PrefillMatchesReference) {
  Random random(TestSeed());
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  std::vector<Case> cases;
  for (DType act : kActs) {
    for (int64_t positions : {1, 15, 16, 17, 255, 256, 257, 600})
      cases.push_back({positions, 4, 2, 16, 16, act});
    for (int head_dim : {1, 7, 24, 56, 100, 128}) cases.push_back({70, 6, 2, head_dim, 16, act});
    for (int block_size : {1, 2, 4, 8, 32, 64, 256})
      cases.push_back({300, 2, 1, 24, block_size, act});
    for (int heads : {1, 2, 5, 8, 30}) cases.push_back({40, heads, 1, 16, 16, act});
    for (int i = 0; i < 4; ++i) {
      const int kv_heads = static_cast<int>(random.Int(1, 3));
      cases.push_back({random.Int(1, 700), kv_heads * static_cast<int>(random.Int(1, 4)), kv_heads,
                       static_cast<int>(random.Int(1, 80)), 1 << random.Int(0, 6), act});
    }
  }
  for (const Case& c : cases) {
    const Inputs in(random, c);
    const Cache cache(*backend.backend, random, ShapeOf(c, 3), c.positions);
    const Guarded out(c.act, {c.positions, c.heads * c.head_dim});
    Step(*backend.backend, c, in, cache, 0, c.positions, out.t());
    ExpectClose(out.t(), Expected(c, in),
                "positions " + std::to_string(c.positions) + " heads " + std::to_string(c.heads) +
                    "/" + std::to_string(c.kv_heads) + " x " + std::to_string(c.head_dim) +
                    " block " + std::to_string(c.block_size),
                nullptr, 2.0);
  }
}

TEST_P(AttentionTest, ChunksAndDecodeGiveTheBitsOfTheWhole) {
  Random random(TestSeed());
  const PooledBackend one = MakeBackend(GetParam(), 1);
  for (DType act : kActs) {
    for (int64_t positions : {40, 530}) {
      for (int heads : {2, 6}) {
        const Case c = {positions, heads, 2, 24, 16, act};
        const Inputs in(random, c);
        const Guarded want(act, {positions, heads * 24});
        const Cache whole(*one.backend, random, ShapeOf(c, 3), positions);
        Step(*one.backend, c, in, whole, 0, positions, want.t());
        const std::vector<int64_t> chunks = {1, 3, 16, 100, 256, 300};
        for (int threads : {1, 2, 5}) {
          const PooledBackend backend = MakeBackend(GetParam(), threads);
          for (size_t i = 0; i < chunks.size(); ++i) {
            const int64_t chunk = chunks[i];
            // The long context once per chunk size, the thread counts in turn.
            if (positions > 300 &&
                std::vector<int>{1, 2, 5}[(i + static_cast<size_t>(heads)) % 3] != threads)
              continue;
            Case other = c;
            other.block_size = chunk == 3 ? 4 : 16;  // the block size changes no bits either
            const Cache cache(*backend.backend, random, ShapeOf(other, 5), positions);
            const Guarded out(act, {positions, heads * 24});
            for (int64_t begin = 0; begin < positions; begin += chunk) {
              const int64_t end = std::min(positions, begin + chunk);
              Step(*backend.backend, other, in, cache, begin, end, out.Rows(begin, end));
            }
            ASSERT_TRUE(SameRows(want.t(), 0, positions, out.t(), 0))
                << DTypeName(act) << " positions " << positions << " chunk " << chunk << ", "
                << threads << " threads";
          }
        }
      }
    }
  }
}

// Decode rows, a chunk and a long prefill in one call, each with its own blocks.
TEST_P(AttentionTest, SequencesDoNotTouchEachOther) {
  Random random(TestSeed());
  constexpr int kHeads = 4, kKvHeads = 2, kHeadDim = 24, kBlock = 16;
  const std::vector<int64_t> lengths = {1, 17, 300, 520, 33};
  for (DType act : kActs) {
    const PooledBackend backend = MakeBackend(GetParam(), 2);
    std::vector<Case> cases;
    std::vector<Inputs> inputs;
    std::vector<Guarded> wants;
    for (int64_t n : lengths) {
      cases.push_back({n, kHeads, kKvHeads, kHeadDim, kBlock, act});
      inputs.emplace_back(random, cases.back());
      wants.emplace_back(act, std::initializer_list<int64_t>{n, kHeads * kHeadDim});
      const Cache alone(*backend.backend, random, ShapeOf(cases.back(), 0), n);
      Step(*backend.backend, cases.back(), inputs.back(), alone, 0, n, wants.back().t());
    }
    // One cache for all; every sequence computed up to `done`, then the rest in one batch.
    KvCacheShape shape = ShapeOf(cases[3], 60);
    const Cache shared(*backend.backend, random, shape,
                       static_cast<int64_t>(shape.num_blocks) * kBlock);
    std::vector<std::vector<int32_t>> tables;
    std::vector<SequenceRows> rows;
    int64_t total = 0;
    size_t used = 0;
    for (size_t s = 0; s < lengths.size(); ++s) {
      const size_t blocks = static_cast<size_t>((lengths[s] + kBlock - 1) / kBlock);
      tables.emplace_back(shared.table.begin() + static_cast<int64_t>(used),
                          shared.table.begin() + static_cast<int64_t>(used + blocks));
      used += blocks;
    }
    for (size_t s = 0; s < lengths.size(); ++s) {
      const int64_t done = s == 0 ? 0 : s % 2 == 0 ? lengths[s] - 1 : lengths[s] / 2;
      if (done > 0) {
        const SequenceRows before = {.block_table = tables[s],
                                     .start_position = 0,
                                     .first_row = 0,
                                     .num_rows = static_cast<int32_t>(done)};
        backend->WriteKv(inputs[s].k.Rows(0, done), inputs[s].v.Rows(0, done), shape, {&before, 1},
                         shared.kv);
      }
      rows.push_back({.block_table = tables[s],
                      .start_position = static_cast<int32_t>(done),
                      .first_row = static_cast<int32_t>(total),
                      .num_rows = static_cast<int32_t>(lengths[s] - done)});
      total += lengths[s] - done;
    }
    const Guarded q(DType::kF32, {total, kHeads, kHeadDim}),
        k(DType::kF32, {total, kKvHeads, kHeadDim}), v(DType::kF32, {total, kKvHeads, kHeadDim});
    for (size_t s = 0; s < lengths.size(); ++s) {
      const auto copy = [&](const Guarded& to, const Guarded& from) {
        const Tensor part = from.Rows(rows[s].start_position, lengths[s]);
        std::memcpy(to.Rows(rows[s].first_row, rows[s].first_row + rows[s].num_rows).data,
                    part.data, part.bytes());
      };
      copy(q, inputs[s].q);
      copy(k, inputs[s].k);
      copy(v, inputs[s].v);
    }
    backend->WriteKv(k.t(), v.t(), shape, rows, shared.kv);
    const Guarded out(act, {total, kHeads * kHeadDim});
    AttentionArgs args;
    args.q = q.t();
    args.kv = &shared.kv;
    args.shape = shape;
    args.sequences = rows;
    args.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
    args.out = out.t();
    backend->Attention(args);
    for (size_t s = 0; s < lengths.size(); ++s) {
      EXPECT_TRUE(
          SameRows(wants[s].t(), rows[s].start_position, lengths[s], out.t(), rows[s].first_row))
          << "sequence " << s;
    }
  }
}

}  // namespace
}  // namespace switchyard::testing
