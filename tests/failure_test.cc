// A worker that fails, seen through the scheduler: every accepted request ends with an error and
// the cell says that it failed.
#include <gtest/gtest.h>

#include <atomic>
#include <random>

#include "comm/test_problems.h"
#include "spdlog/spdlog.h"
#include "tests/cell.h"

namespace switchyard {
namespace {

// In step `step` one token of the first plan is outside the vocabulary, which the worker that gets
// it cannot compute; the other ranks of the step wait for its rows.
std::function<void(StepPlan*)> BreakStep(uint64_t step) {
  return [step, done = std::make_shared<std::atomic<bool>>(false)](StepPlan* plan) {
    if (plan->header.step < step || done->exchange(true)) return;
    SequenceWork& work = plan->work[0];
    work.token_start = work.start;
    work.tokens = {1 << 30};
  };
}

TEST(Failure, AWorkersErrorEndsEveryAcceptedRequest) {
  spdlog::set_level(spdlog::level::off);
  std::mt19937 rng = SeededRng();
  CellOptions workers;
  workers.model_dir = FixtureDir("qwen3_moe");
  workers.attention_workers = 2;
  workers.expert_workers = 2;
  workers.threads = 2;
  workers.max_num_seqs = 4;  // so that some requests still wait
  workers.max_num_batched_tokens = 32;
  Cell cell(workers, {}, BreakStep(6));
  EXPECT_FALSE(cell.Stats().failed);
  std::vector<Cell::Submitted> accepted;
  for (int i = 0; i < 12; ++i) {
    Request request;
    for (int32_t t = 0; t < 20; ++t) request.prompt.push_back(Below(rng, 300));
    request.choices.resize(static_cast<size_t>(1 + i % 3));
    request.max_tokens = 400;
    absl::StatusOr<Cell::Submitted> submitted = cell.Submit(request);
    if (submitted.ok()) accepted.push_back(*std::move(submitted));
  }
  ASSERT_FALSE(accepted.empty());
  for (const Cell::Submitted& submitted : accepted) {
    for (const ChoiceReply& choice : submitted.reply->Wait()) {
      EXPECT_EQ(choice.reason, FinishReason::kError);
      EXPECT_EQ(choice.error.code(), absl::StatusCode::kUnavailable);
      EXPECT_NE(std::string(choice.error.message()).find("token 1073741824"), std::string::npos)
          << choice.error;
    }
  }
  cell.Drain();  // the statistics are published
  const SchedulerStats stats = cell.Stats();
  EXPECT_TRUE(stats.failed);
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.kv_usage, 0);
  Request late;
  late.prompt = {1};
  late.choices.resize(1);
  late.max_tokens = 1;
  EXPECT_EQ(cell.Submit(late).status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace switchyard
