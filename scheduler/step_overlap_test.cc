// Two steps in flight: what the next step may count on, and what becomes of it when it counted on
// too much.
#include <gtest/gtest.h>

#include "scheduler/core_fixture.h"

namespace switchyard {
namespace {

class StepOverlapTest : public SchedulerCoreTest {
 protected:
  StepOverlapTest() { options_.max_steps_in_flight = 2; }

  const StepPlan& PlanOf(const SchedulerCore::Step& step, int32_t worker = 0) {
    for (const auto& [rank, plan] : step.plans) {
      if (rank == worker) return plan;
    }
    ADD_FAILURE() << "no plan for " << worker;
    return step.plans[0].second;
  }
  void Answer(const SchedulerCore::Step& step) {
    for (const auto& [rank, plan] : step.plans) Apply(workers_[rank].Run(plan));
    Receive();
  }
  void Fail(const SchedulerCore::Step& step) {
    for (const auto& [rank, plan] : step.plans) {
      Apply({plan.header.epoch, plan.header.step, rank, "lost", false, {}});
    }
    Receive();
  }
};

TEST_F(StepOverlapTest, ADecodeIsPlannedBeforeItsTokenIsKnown) {
  Make();
  const Request request = MakeRequest(Prompt(6), 3);
  const RequestId id = Submit(request);
  const auto prefill = Plan();
  const auto decode = Plan();
  ASSERT_TRUE(prefill && decode);
  EXPECT_FALSE(core_->CanPlan());
  EXPECT_FALSE(Plan());
  const SequenceWork& work = PlanOf(*decode).work.at(0);
  EXPECT_EQ(work.start, 6);
  EXPECT_EQ(work.count, 1);
  EXPECT_TRUE(work.sample);
  EXPECT_TRUE(work.tokens.empty());
  EXPECT_EQ(work.begin, nullptr);
  Answer(*prefill);
  EXPECT_EQ(Result(id).tokens.size(), 1u);
  const auto last = Plan();
  ASSERT_TRUE(last);
  Answer(*decode);
  EXPECT_FALSE(Plan()) << "its last token is on its way";
  Answer(*last);
  ExpectRight(id, request);
  EXPECT_TRUE(core_->idle());
}

TEST_F(StepOverlapTest, ChunksOfAPromptFollowOneAnother) {
  options_.max_num_batched_tokens = 4;
  Make();
  const Request request = MakeRequest(Prompt(10), 1);
  const RequestId id = Submit(request);
  const auto first = Plan();
  const auto second = Plan();
  EXPECT_EQ(PlanOf(*second).work.at(0).start, 4);
  EXPECT_FALSE(PlanOf(*second).work.at(0).sample);
  Answer(*first);
  const auto third = Plan();
  EXPECT_EQ(PlanOf(*third).work.at(0).start, 8);
  EXPECT_TRUE(PlanOf(*third).work.at(0).sample);
  Answer(*second);
  Answer(*third);
  ExpectRight(id, request);
}

TEST_F(StepOverlapTest, AStopMakesTheNextRowSuperfluous) {
  model_.vocab_size = 2;
  Make();
  Request request = MakeRequest({1, 0, 1}, 50);
  request.stop_token_ids = {0, 1};
  const RequestId id = Submit(request);
  const auto step = Plan();
  const auto next = Plan();
  Answer(*step);
  EXPECT_EQ(Result(id).last.reason, FinishReason::kStop);
  EXPECT_TRUE(core_->idle());
  EXPECT_EQ(core_->Stats().kv_usage, 0);
  Answer(*next);
  EXPECT_EQ(Result(id).tokens.size(), 1u);
  EXPECT_EQ(core_->Stats().dropped_results, 1u);
  EXPECT_FALSE(core_->step_in_flight());
}

TEST_F(StepOverlapTest, LogitsThatAreNotFiniteFailOnlyTheirRequest) {
  Make();
  Request sick = MakeRequest(Prompt(5), 9);
  sick.choices[0].seed = 777;
  const Request healthy = MakeRequest(Prompt(7), 9);
  const RequestId a = Submit(sick), b = Submit(healthy);
  auto in_flight = Plan();
  for (int32_t i = 0; i < 40 && in_flight; ++i) {
    auto next = Plan();
    Answer(*in_flight);
    in_flight = next ? std::move(next) : Plan();
  }
  EXPECT_EQ(Result(a).last.reason, FinishReason::kError);
  ExpectRight(b, healthy);
}

TEST_F(StepOverlapTest, CancelledRowsInFlightAreDropped) {
  Make();
  const RequestId id = Submit(MakeRequest(Prompt(6), 9));
  const auto step = Plan();
  const auto next = Plan();
  core_->Cancel(id);
  core_->CheckIntegrity();
  EXPECT_EQ(core_->Stats().kv_usage, 0);
  Answer(*step);
  Answer(*next);
  EXPECT_EQ(core_->Stats().dropped_results, 2u);
  EXPECT_EQ(Result(id).tokens.size(), 0u);
}

// The worker fails in the first of two steps, and so in the second: one strike, and everything is
// told anew.
TEST_F(StepOverlapTest, AFailedStepTakesTheNextOneAlong) {
  Make();
  const Request request = MakeRequest(Prompt(6), 5);
  const RequestId id = Submit(request);
  const auto step = Plan();
  const auto next = Plan();
  Fail(*step);
  const auto again = Plan();  // the second is still in flight
  ASSERT_TRUE(again);
  EXPECT_EQ(PlanOf(*again).work.at(0).start, 0);
  EXPECT_NE(PlanOf(*again).work.at(0).begin, nullptr);
  Fail(*next);
  EXPECT_EQ(core_->Stats().worker_errors, 1u);
  Answer(*again);
  RunUntilIdle();
  ExpectRight(id, request);
}

TEST_F(StepOverlapTest, ASuspectHasTheWorkersToItself) {
  Make();
  const Request request = MakeRequest(Prompt(6), 5), poisoned = [&] {
    Request r = MakeRequest(Prompt(5), 5);
    r.choices[0].seed = 666;
    return r;
  }();
  const RequestId bad = Submit(poisoned), good = Submit(request);
  for (int32_t i = 0; i < 100 && !core_->idle(); ++i) {
    auto step = Plan();
    if (!step) break;
    const bool alone = PlanOf(*step).work.size() == 1;
    auto next = Plan();
    if (i == 2) {
      EXPECT_TRUE(alone && !next) << "struck twice";
    }
    const bool failed = !workers_[0].Run(PlanOf(*step)).error.empty();
    if (failed) {
      Fail(*step);
      if (next) Fail(*next);
      continue;
    }
    break;
  }
  EXPECT_EQ(Result(bad).last.reason, FinishReason::kError);
  EXPECT_FALSE(Result(good).last.finished);
}

TEST_F(StepOverlapTest, ADeathStrikesOnceForTwoSteps) {
  Make();
  const Request request = MakeRequest(Prompt(6), 5);
  const RequestId id = Submit(request);
  uint64_t epoch = 1;
  for (int32_t deaths = 1; deaths <= 2; ++deaths) {
    ASSERT_TRUE(Plan());
    EXPECT_EQ(Plan().has_value(), true);
    core_->EndEpoch({.epoch = epoch, .lost_attention = {}, .expert_lost = true});
    Receive();
    ++epoch;
    core_->Install({.epoch = epoch, .attention = {{1, model_.num_kv_blocks}}});
    workers_[0].Install(epoch, 0, true);
  }
  EXPECT_EQ(core_->Stats().lost_steps, 4u);
  const auto alone = Plan();
  ASSERT_TRUE(alone);
  EXPECT_FALSE(Plan());
  Answer(*alone);
  EXPECT_TRUE(core_->CanPlan()) << "progress clears strikes";
  RunUntilIdle();
  ExpectRight(id, request);
}

TEST_F(StepOverlapTest, APauseWaitsForBothSteps) {
  Make();
  Submit(MakeRequest(Prompt(6), 9));
  const auto step = Plan();
  const auto next = Plan();
  core_->Pause({1});
  EXPECT_FALSE(core_->TakePaused());
  Answer(*step);
  EXPECT_FALSE(core_->TakePaused());
  EXPECT_FALSE(Plan());
  Answer(*next);
  EXPECT_EQ(core_->TakePaused(), 1u);
}

// Blocks run out while the youngest has a row in flight: it is not preempted for nothing.
TEST_F(StepOverlapTest, NobodyIsPreemptedWithRowsInFlight) {
  model_.num_kv_blocks = 8;
  Make();
  const Request a = MakeRequest(Prompt(12), 12), b = MakeRequest(Prompt(12, 300), 12);
  const RequestId old = Submit(a), young = Submit(b);
  auto in_flight = Plan();
  for (int32_t i = 0; i < 200 && in_flight; ++i) {
    auto next = Plan();
    Answer(*in_flight);
    in_flight = next ? std::move(next) : Plan();
  }
  EXPECT_GT(core_->Stats().preemptions, 0u);
  EXPECT_EQ(core_->Stats().dropped_results, 0u);
  ExpectRight(old, a);
  ExpectRight(young, b);
}

// The oldest waits for the youngest to have no rows in flight; who is between them and needs no
// block goes on.
TEST_F(StepOverlapTest, WhoNeedsNoBlockGoesOnWhileAnotherWaits) {
  model_.num_kv_blocks = 10;
  Make();
  const Request a = MakeRequest(Prompt(12), 9), b = MakeRequest(Prompt(9, 300), 9),
                c = MakeRequest(Prompt(8, 600), 9);
  const RequestId old = Submit(a);
  for (int32_t i = 0; i < 3; ++i) Step();  // 4 blocks, positions to 13
  const RequestId middle = Submit(b), young = Submit(c);
  const auto prefill = Plan();  // 3 and 2 blocks
  const auto decode = Plan();   // the youngest takes the last one
  ASSERT_TRUE(prefill && decode);
  EXPECT_EQ(PlanOf(*decode).work.size(), 3u);
  Answer(*prefill);
  const auto next = Plan();  // the oldest needs a fifth
  ASSERT_TRUE(next);
  ASSERT_EQ(PlanOf(*next).work.size(), 1u);
  EXPECT_EQ(PlanOf(*next).work[0].start, 10) << "the middle one";
  EXPECT_EQ(core_->Stats().preemptions, 0u);
  Answer(*decode);
  const auto later = Plan();
  ASSERT_TRUE(later);
  EXPECT_EQ(core_->Stats().preemptions, 1u) << "the youngest, with nothing in flight";
  Answer(*next);
  Answer(*later);
  RunUntilIdle();
  ExpectRight(old, a);
  ExpectRight(middle, b);
  ExpectRight(young, c);
  EXPECT_EQ(core_->Stats().dropped_results, 0u);
}

// What the wait is for: the youngest ends with its row in flight, and nobody is preempted.
TEST_F(StepOverlapTest, NobodyIsPreemptedForBlocksThatComeByThemselves) {
  model_.num_kv_blocks = 7;
  Make();
  const Request a = MakeRequest(Prompt(12), 9), b = MakeRequest(Prompt(8, 300), 2);
  const RequestId old = Submit(a);
  for (int32_t i = 0; i < 3; ++i) Step();
  const RequestId young = Submit(b);
  const auto prefill = Plan();
  const auto decode = Plan();  // the youngest takes the last block, for its last token
  ASSERT_TRUE(prefill && decode);
  Answer(*prefill);
  EXPECT_FALSE(Plan());
  Answer(*decode);
  RunUntilIdle();
  EXPECT_EQ(core_->Stats().preemptions, 0u);
  ExpectRight(old, a);
  ExpectRight(young, b);
}

TEST_F(StepOverlapTest, AnAnswerNamesRowsThatAreGone) {
  Make();
  const RequestId id = Submit(MakeRequest(Prompt(6), 9));
  const auto step = Plan();
  core_->Cancel(id);
  StepResult nothing = workers_[0].Run(PlanOf(*step));
  nothing.results.clear();
  Apply(nothing);
  EXPECT_EQ(core_->Stats().worker_errors, 1u) << "it may not have seen the plan";
}

// It fills its worker with a token that is only expected: it waits for it, then moves to the larger
// one.
TEST_F(StepOverlapTest, WhoOutgrowsItsWorkerMovesOnce) {
  model_.num_kv_blocks = 10;
  core_ = std::make_unique<SchedulerCore>(options_, model_);
  core_->Install({.epoch = 1, .attention = {{1, 4}, {2, 10}}});
  for (int32_t rank = 0; rank < 2; ++rank) workers_.emplace_back(model_, rank);
  const Request request = MakeRequest(Prompt(14), 12);
  const RequestId id = Submit(request);
  std::vector<int32_t> ranks;
  auto in_flight = Plan();
  for (int32_t i = 0; i < 100 && in_flight; ++i) {
    ranks.push_back(in_flight->plans.at(0).first);
    auto next = Plan();
    Answer(*in_flight);
    in_flight = next ? std::move(next) : Plan();
  }
  EXPECT_EQ(ranks.front(), 0);
  EXPECT_EQ(ranks.back(), 1);
  EXPECT_TRUE(std::ranges::is_sorted(ranks));
  EXPECT_EQ(core_->Stats().preemptions, 1u);
  EXPECT_EQ(core_->Stats().dropped_results, 0u);
  ExpectRight(id, request);
}

// A worker without rows in the first step may be done with the second one before.
TEST_F(StepOverlapTest, StepsMayCompleteInAnyOrder) {
  model_.num_kv_blocks = 4;  // the first request fills a worker
  Make(2);
  const Request a = MakeRequest(Prompt(15), 1), b = MakeRequest(Prompt(7, 300), 1);
  const RequestId first = Submit(a);
  const auto step = Plan();
  const RequestId second = Submit(b);
  const auto next = Plan();
  ASSERT_TRUE(step && next);
  ASSERT_NE(step->plans[0].first, next->plans[0].first);
  Answer(*next);
  ExpectRight(second, b);
  Answer(*step);
  ExpectRight(first, a);
  EXPECT_FALSE(core_->step_in_flight());
}

TEST_F(StepOverlapTest, AnAnswerOutOfTurnIsAnError) {
  Make();
  Submit(MakeRequest(Prompt(6), 9));
  const auto step = Plan();
  const auto next = Plan();
  Answer(*step);
  const auto third = Plan();
  StepResult result = workers_[0].Run(PlanOf(*next));
  result.step = third->step;
  Apply(result);
  EXPECT_EQ(core_->Stats().worker_errors, 1u);
}

}  // namespace
}  // namespace switchyard
