#include "worker/memory_plan.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/thread_pool.h"

namespace switchyard {
namespace {

class MemoryPlanTest : public testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<OpenedModel> model =
        OpenModel({.model_dir = absl::StrCat(SWITCHYARD_SOURCE_DIR, "/tests/fixtures/mixtral")});
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    std::string error;
    backend_ = MakeCpuBackend(&pool_, "portable", &error);
    ASSERT_NE(backend_, nullptr) << error;
  }
  int64_t Left(const MemoryUse& use) {
    const absl::StatusOr<int64_t> left = MemoryLeft(model_, use, *backend_, int64_t{1} << 40);
    EXPECT_TRUE(left.ok()) << left.status();
    return left.ok() ? *left : 0;
  }

  ThreadPool pool_{1};
  OpenedModel model_;
  std::unique_ptr<ComputeBackend> backend_;
  MemoryUse use_ = {.attention_workers = 1,
                    .expert_workers = 1,
                    .expert_weights_bytes = 1000,
                    .kv_bytes = 5000,
                    .ranks = {.num_attention = 3, .num_experts = 4},
                    .max_rows = 64,
                    .threads = 1,
                    .eager_bytes = 0};
};

TEST_F(MemoryPlanTest, CountsWhatPeersMaySendAhead) {
  const int64_t without = Left(use_);
  use_.eager_bytes = 1 << 20;
  EXPECT_EQ(without - Left(use_), 2 * 6 * (int64_t{1} << 20)) << "2 ranks with 6 peers each";
}

TEST_F(MemoryPlanTest, TooLittleIsAnErrorWithTheSum) {
  const int64_t all = (int64_t{1} << 40) - Left(use_);
  EXPECT_EQ(MemoryLeft(model_, use_, *backend_, all).value_or(-1), 0);
  const absl::Status status = MemoryLeft(model_, use_, *backend_, all - 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              testing::HasSubstr(absl::StrCat("take ", all, " bytes, but ", all - 1, " bytes")));
}

TEST_F(MemoryPlanTest, StepsThatCannotBePlannedAreRefused) {
  use_.max_rows = 1 << 28;
  EXPECT_EQ(MemoryLeft(model_, use_, *backend_, INT64_MAX).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace switchyard
