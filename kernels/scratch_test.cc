// What a back end says it may allocate bounds what it does allocate, on every path.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/test_support.h"

namespace switchyard::testing {
namespace {

class ScratchTest : public EveryPath {};
SY_EVERY_PATH(ScratchTest);

size_t Held(const PooledBackend& backend) {
  return static_cast<const cpu::CpuBackend&>(*backend.backend).scratch_bytes();
}

void Matmul(ComputeBackend& backend, Random& random, const ScratchLimits& l) {
  const Guarded x = random.Normal(l.act, {l.matmul_rows, l.matmul_k});
  const Guarded w = random.Normal(l.act, {5, l.matmul_k});
  const Guarded out(DType::kF32, {l.matmul_rows, 5});
  backend.Matmul(x.t(), backend.Pack(w.t(), FormatOf(l.act)), nullptr, out.t());
}

void Mlp(ComputeBackend& backend, Random& random, const ScratchLimits& l) {
  const Guarded x = random.Normal(l.act, {l.mlp_rows, l.mlp_hidden});
  const Guarded up = random.Normal(l.act, {l.mlp_width, l.mlp_hidden});
  const Guarded down = random.Normal(l.act, {l.mlp_hidden, l.mlp_width});
  const Guarded out(l.act, {l.mlp_rows, l.mlp_hidden});
  const MlpWeights weights = backend.PackMlp(up.t(), up.t(), down.t(), FormatOf(l.act));
  const int64_t half = l.mlp_rows / 2;
  const MlpGroup groups[] = {{&weights, 0, half}, {&weights, half, l.mlp_rows}};
  backend.GroupedMlp(x.t(), groups, out.t());
}

// The last `attention_rows` positions of one sequence of max_positions.
void Attention(ComputeBackend& backend, Random& random, const ScratchLimits& l) {
  const int num_blocks = static_cast<int>((l.max_positions + 15) / 16);
  const KvCacheShape shape = {.num_blocks = num_blocks,
                              .block_size = 16,
                              .num_kv_heads = static_cast<int>(l.num_kv_heads),
                              .head_dim = static_cast<int>(l.head_dim),
                              .dtype = l.act};
  const int64_t words =
      static_cast<int64_t>(backend.KvBlockBytes(shape) / sizeof(float)) * num_blocks;
  const Guarded kv = random.Normal(DType::kF32, {words});
  std::vector<int32_t> table;
  for (int32_t b = 0; b < num_blocks; ++b) table.push_back(b);
  const SequenceRows rows = {
      .block_table = table,
      .start_position = static_cast<int32_t>(l.max_positions - l.attention_rows),
      .first_row = 0,
      .num_rows = static_cast<int32_t>(l.attention_rows)};
  const Guarded q = random.Normal(DType::kF32, {l.attention_rows, l.num_heads, l.head_dim});
  const Guarded out(l.act, {l.attention_rows, l.num_heads * l.head_dim});
  backend.Attention({.q = q.t(),
                     .kv = &kv.t(),
                     .shape = shape,
                     .sequences = {&rows, 1},
                     .scale = 0.1f,
                     .out = out.t()});
}

TEST_P(ScratchTest, NothingGrowsBeyondTheBound) {
  Random random(TestSeed());
  for (int trial = 0; trial < 40; ++trial) {
    const int64_t kv_heads = random.Int(1, 3);
    const ScratchLimits l = {.act = kActs[random.Int(0, 1)],
                             .matmul_rows = random.Int(1, 200),
                             .matmul_k = random.Int(1, 300),
                             .mlp_rows = random.Int(2, 200),
                             .mlp_hidden = random.Int(1, 200),
                             .mlp_width = random.Int(1, 200),
                             .attention_rows = random.Int(1, 40),
                             .num_heads = kv_heads * random.Int(1, 30),
                             .num_kv_heads = kv_heads,
                             .head_dim = 2 * random.Int(1, 16),
                             .max_positions = random.Int(40, 1500)};
    const PooledBackend backend = MakeBackend(GetParam(), static_cast<int>(random.Int(1, 5)));
    const size_t bound = static_cast<size_t>(backend->MaxScratch(l).backend);
    Matmul(*backend.backend, random, l);
    Mlp(*backend.backend, random, l);
    Attention(*backend.backend, random, l);
    ASSERT_LE(Held(backend), bound);
    ASSERT_GT(Held(backend), 0u);
  }
}

TEST_P(ScratchTest, NothingGrowsOnceReserved) {
  Random random(3);
  const ScratchLimits l = {.act = DType::kBF16,
                           .matmul_rows = 70,
                           .matmul_k = 300,
                           .mlp_rows = 90,
                           .mlp_hidden = 200,
                           .mlp_width = 100,
                           .attention_rows = 20,
                           .num_heads = 8,
                           .num_kv_heads = 2,
                           .head_dim = 16,
                           .max_positions = 900};
  const PooledBackend backend = MakeBackend(GetParam(), 3);
  backend->Reserve(l);
  const size_t reserved = Held(backend);
  EXPECT_EQ(static_cast<int64_t>(reserved), backend->MaxScratch(l).backend);
  Matmul(*backend.backend, random, l);
  Mlp(*backend.backend, random, l);
  Attention(*backend.backend, random, l);
  EXPECT_EQ(Held(backend), reserved);
}

TEST_P(ScratchTest, TheBoundOfGroupedRowsIsTight) {
  Random random(1);
  const ScratchLimits l = {
      .act = DType::kBF16, .mlp_rows = 300, .mlp_hidden = 256, .mlp_width = 128};
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  EXPECT_EQ(Held(backend), 0u);
  Mlp(*backend.backend, random, l);
  const int64_t bound = backend->MaxScratch(l).backend;
  EXPECT_EQ(static_cast<int64_t>(Held(backend)), bound);
  EXPECT_GE(bound, 300 * (256 + 128) * 2);
}

}  // namespace
}  // namespace switchyard::testing
