// What a steady decode step allocates on the workers' threads: its result, pages of the queues and
// the driver's list of results; nothing per layer, per expert or per row.
#include <gtest/gtest.h>

#include <random>

#include "kernels/count_allocations.h"
#include "worker/test_cases.h"
#include "worker/test_driver.h"

namespace switchyard {
namespace {

int64_t AllocationsPerStep(int sequences, int steps) {
  CellOptions options;
  options.model_dir = std::string(SWITCHYARD_SOURCE_DIR) + "/models/demo";
  options.expert_workers = 2;
  options.threads = 2;
  options.kv_cache_memory = 64 << 20;
  options.max_num_batched_tokens = 256;
  const std::unique_ptr<LocalCell> cell = MakeCell(options);
  TestDriver driver(cell.get());
  std::mt19937 random(1);
  std::vector<SequenceId> ids;
  for (int i = 0; i < sequences; ++i) {
    ids.push_back(
        driver.Add(0, RandomTokens(8, cell->model_info().vocab_size, random), SamplingParams{}));
  }
  const auto step = [&](int32_t rows) {
    for (SequenceId id : ids) driver.Plan(id, rows);
    EXPECT_EQ(driver.Step(), "");
  };
  step(8);
  for (int i = 0; i < 20; ++i) step(1);
  const int64_t before = num_allocations.load();
  for (int i = 0; i < steps; ++i) step(1);
  return num_allocations.load() - before;
}

TEST(AllocationTest, ADecodeStepAllocatesItsResult) {
  count_allocations = false;  // of the driver, which plays the scheduler
  constexpr int kSteps = 64;
  for (int sequences : {1, 16}) {
    const int64_t allocations = AllocationsPerStep(sequences, kSteps);
    EXPECT_LE(allocations, 4 * kSteps) << sequences << " sequences";
  }
}

}  // namespace
}  // namespace switchyard
