#include "worker/kv_cache.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

KvBudget Budget() {
  return {.available_bytes = int64_t{1} << 30,
          .bytes_per_block = 1 << 20,
          .max_model_len = 100,  // 7 blocks
          .max_num_seqs = 10,
          .num_workers = 1};
}

TEST(KvBudgetTest, DefaultIsWhatTheSequencesCanUse) { EXPECT_EQ(*PlanKvBlocks(Budget()), 70); }

TEST(KvBudgetTest, DefaultIsAtMostHalfOfTheMemory) {
  KvBudget budget = Budget();
  budget.max_num_seqs = 1000;
  EXPECT_EQ(*PlanKvBlocks(budget), 512);
  budget.num_workers = 4;
  EXPECT_EQ(*PlanKvBlocks(budget), 128);
}

TEST(KvBudgetTest, ARequestIsTakenAsItIs) {
  KvBudget budget = Budget();
  budget.requested_bytes = int64_t{100} << 20;
  EXPECT_EQ(*PlanKvBlocks(budget), 100);
}

TEST(KvBudgetTest, TooLittleIsAnErrorWithTheSum) {
  KvBudget budget = Budget();
  budget.requested_bytes = int64_t{13} << 20;
  budget.num_workers = 2;
  const std::string error(PlanKvBlocks(budget).status().message());
  EXPECT_THAT(
      error,
      HasSubstr("7 blocks of 1048576 bytes in each of 2 attention workers = 14680064 bytes"));
  EXPECT_THAT(error, HasSubstr("there are 13631488 bytes"));
}

TEST(KvBudgetTest, MoreThanThereIsIsAnError) {
  KvBudget budget = Budget();
  budget.requested_bytes = int64_t{2} << 30;
  EXPECT_THAT(std::string(PlanKvBlocks(budget).status().message()),
              HasSubstr("leave 1073741824 bytes (1.000 GiB)"));
}

TEST(KvBudgetTest, MemoryOfThisMachineIsKnown) { EXPECT_GT(AvailableMemoryBytes(), 1 << 20); }

}  // namespace
}  // namespace switchyard
