// Epochs in the SchedulerCore: who keeps its sequences, who is struck, what waits.
#include <gtest/gtest.h>

#include <algorithm>

#include "scheduler/core_fixture.h"

namespace switchyard {
namespace {

class CoreEpochTest : public SchedulerCoreTest {
 protected:
  struct Worker {
    uint64_t id = 0;
    int32_t num_blocks = 50;
  };

  // Installs an epoch of these workers; those that were there before keep their fakes.
  void Install(const std::vector<Worker>& workers, bool forget = true) {
    if (!core_) core_ = std::make_unique<SchedulerCore>(options_, model_);
    EpochView view{.epoch = ++epoch_, .attention = {}};
    std::vector<FakeWorker> fakes;
    for (const Worker& worker : workers) {
      view.attention.push_back({worker.id, worker.num_blocks});
      const auto old = std::find(ids_.begin(), ids_.end(), worker.id);
      if (old != ids_.end()) {
        fakes.push_back(std::move(workers_[old - ids_.begin()]));
      } else {
        ModelInfo model = model_;
        model.num_kv_blocks = worker.num_blocks;
        fakes.emplace_back(model, 0);
      }
      fakes.back().Install(epoch_, static_cast<int32_t>(fakes.size()) - 1, forget);
    }
    workers_ = std::move(fakes);
    ids_.clear();
    for (const Worker& worker : workers) ids_.push_back(worker.id);
    core_->Install(view);
    core_->CheckIntegrity();
  }
  void Pause() {
    core_->Pause({epoch_});
    EXPECT_EQ(core_->TakePaused(), epoch_);
  }
  void End(std::vector<uint64_t> lost_attention, bool expert_lost = false) {
    core_->EndEpoch({epoch_, std::move(lost_attention), expert_lost});
    core_->CheckIntegrity();
    Receive();
  }
  static const SequenceWork* Find(const SchedulerCore::Step& step, SequenceId id) {
    for (const auto& [rank, plan] : step.plans) {
      for (const SequenceWork& work : plan.work) {
        if (work.sequence == id) return &work;
      }
    }
    return nullptr;
  }

  uint64_t epoch_ = 0;
  std::vector<uint64_t> ids_;  // by rank
};

TEST_F(CoreEpochTest, RequestsWaitForTheFirstEpoch) {
  core_ = std::make_unique<SchedulerCore>(options_, model_);
  const Request request = MakeRequest(Prompt(10), 4);
  const RequestId id = Submit(request);
  EXPECT_FALSE(Step());
  EXPECT_EQ(core_->Stats().waiting, 1);
  EXPECT_EQ(core_->Stats().epoch, 0u);
  EXPECT_EQ(core_->Stats().kv_usage, 0);
  Install({{7}});
  EXPECT_EQ(core_->Stats().epoch, 1u);
  RunUntilIdle();
  ExpectRight(id, request);
}

TEST_F(CoreEpochTest, ASurvivorKeepsItsSequencesAndCacheUnderItsNewRank) {
  Install({{7}, {8}});
  const Request ra = MakeRequest(Prompt(16, 100), 8), rb = MakeRequest(Prompt(16, 200), 8);
  const RequestId a = Submit(ra), b = Submit(rb);
  const auto first = Step();
  EXPECT_EQ(first->plans.size(), 2u);
  Pause();
  Install({{9}, {8}, {7}}, /*forget=*/false);
  EXPECT_EQ(core_->Stats().moved_sequences, 0u);
  const auto step = Step();
  // Told anew, not computed anew.
  EXPECT_EQ(step->plans[0].second.header.participants, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(step->plans[0].second.header.epoch, 2u);
  EXPECT_GT(step->plans[0].second.header.slots_generation,
            first->plans[0].second.header.slots_generation);
  EXPECT_EQ(Rows(*step), 2);
  for (const SequenceId id : {1, 2}) {
    ASSERT_TRUE(Find(*step, id)->begin);
    EXPECT_EQ(Find(*step, id)->run, 0u);
    EXPECT_EQ(Find(*step, id)->begin->tokens.size(), 17u);
  }
  RunUntilIdle();
  ExpectRight(a, ra);
  ExpectRight(b, rb);
  const RequestId again = Submit(rb);
  EXPECT_EQ(Step()->plans[0].first, 1);  // where its prefix is
  RunUntilIdle();
  EXPECT_EQ(Result(again).last.cached_tokens, 12);
}

TEST_F(CoreEpochTest, ALostWorkersSequencesAreComputedElsewhereWithTheirTokens) {
  Install({{7}, {8}});
  const Request ra = MakeRequest(Prompt(16, 100), 9), rb = MakeRequest(Prompt(16, 200), 9);
  const RequestId a = Submit(ra), b = Submit(rb);
  Step();
  Step();
  const auto lost = Plan();
  ASSERT_TRUE(lost);
  const StepResult survivors = workers_[1].Run(lost->plans[1].second);
  Apply(survivors);  // committed: tokens first
  const StepResult late = workers_[0].Run(lost->plans[0].second);
  End({7});
  EXPECT_EQ(Result(b).tokens.size(), 3u);
  EXPECT_FALSE(Plan());
  Submit(MakeRequest(Prompt(3), 1));  // goes on
  Apply(late);
  EXPECT_EQ(core_->Stats().dropped_results, 1u);
  Install({{8}});
  Apply(late);
  EXPECT_EQ(core_->Stats().dropped_results, 2u);
  EXPECT_EQ(core_->Stats().moved_sequences, 1u);
  EXPECT_EQ(core_->Stats().lost_steps, 1u);
  const auto step = Step();
  EXPECT_EQ(Find(*step, 1)->run, 1u);
  EXPECT_EQ(Find(*step, 1)->start, 0);
  EXPECT_EQ(Find(*step, 1)->begin->tokens.size(), 18u);
  EXPECT_EQ(Find(*step, 2)->count, 1);
  RunUntilIdle();
  ExpectRight(a, ra);
  ExpectRight(b, rb);
}

TEST_F(CoreEpochTest, AStepInFlightEndsBeforeThePauseIsAcknowledged) {
  Install({{7}});
  const Request request = MakeRequest(Prompt(6), 5);
  const RequestId id = Submit(request);
  const auto step = Plan();
  core_->Pause({epoch_ + 1});  // of another epoch
  core_->Pause({epoch_});
  EXPECT_FALSE(core_->TakePaused());
  Apply(workers_[0].Run(step->plans[0].second));
  Receive();
  EXPECT_EQ(Result(id).tokens.size(), 1u);
  EXPECT_FALSE(Plan());
  EXPECT_EQ(core_->TakePaused(), 1u);
  EXPECT_FALSE(core_->TakePaused());  // once
  core_->EndEpoch({epoch_, {7}, false});
  core_->EndEpoch({epoch_, {7}, false});
  Install({{8}});
  RunUntilIdle();
  ExpectRight(id, request);
}

TEST_F(CoreEpochTest, AnEndVoidsAPause) {
  Install({{7}});
  Submit(MakeRequest(Prompt(6), 5));
  Plan();
  core_->Pause({epoch_});
  End({}, /*expert_lost=*/true);
  EXPECT_FALSE(core_->TakePaused());
}

TEST_F(CoreEpochTest, StaleEndsAreIgnored) {
  Install({{7}});
  Pause();
  Install({{7}});
  const Request request = MakeRequest(Prompt(6), 5);
  const RequestId id = Submit(request);
  const auto step = Plan();
  core_->EndEpoch({1, {7}, false});
  core_->EndEpoch({3, {7}, false});  // prepared, never installed
  EXPECT_TRUE(core_->step_in_flight());
  Apply(workers_[0].Run(step->plans[0].second));
  RunUntilIdle();
  ExpectRight(id, request);
}

// Runs `kill` on steps of two workers until a request failed or all have ended. True when one
// failed.
TEST_F(CoreEpochTest, AnAttentionWorkersDeathStrikesOnlyItsSequences) {
  Install({{1}, {2}});
  const Request ra = MakeRequest(Prompt(8, 100), 8), rb = MakeRequest(Prompt(8, 200), 8);
  const RequestId a = Submit(ra), b = Submit(rb);
  uint64_t next_worker = 3;
  // The worker of a dies in every step that has rows of a.
  std::vector<size_t> sequences;
  while (!Result(a).last.finished) {
    const auto step = Plan();
    ASSERT_TRUE(step);
    const bool kills = Find(*step, 1) != nullptr;
    if (kills) sequences.push_back(step->plans[0].second.work.size() + step->plans.size() - 1);
    std::vector<uint64_t> lost;
    std::vector<Worker> next;
    for (const auto& [rank, plan] : step->plans) {
      const bool dies = std::any_of(plan.work.begin(), plan.work.end(),
                                    [](const SequenceWork& w) { return w.sequence == 1; });
      if (dies) lost.push_back(ids_[rank]);
    }
    for (uint64_t id : ids_) {
      if (std::find(lost.begin(), lost.end(), id) == lost.end()) next.push_back({id});
    }
    if (!kills) {
      for (const auto& [rank, plan] : step->plans) Apply(workers_[rank].Run(plan));
      Receive();
      continue;
    }
    End(lost);
    next.push_back({next_worker++});
    Install(next);
  }
  EXPECT_EQ(sequences.size(), 3u);
  EXPECT_EQ(sequences.back(), 1u);  // alone
  EXPECT_EQ(Result(a).last.error.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Result(a).last.error.message(),
            "the request failed after 3 aborted steps, the last one alone: its attention worker "
            "was lost");
  RunUntilIdle();
  ExpectRight(b, rb);
}

TEST_F(CoreEpochTest, AnExpertWorkersDeathStrikesTheWholeStepAndInnocentsGetOn) {
  Install({{1}, {2}});
  std::vector<std::pair<RequestId, Request>> good;
  for (int32_t i = 0; i < 4; ++i) {
    const Request r = MakeRequest(Prompt(9, 20 * i), 6);
    good.emplace_back(Submit(r), r);
  }
  Step();
  Request bad = MakeRequest(Prompt(7), 6);
  bad.choices[0].seed = 666;  // its rows kill an expert worker
  const RequestId id = Submit(bad);
  int32_t kills = 0;
  while (!core_->idle()) {
    const auto step = Plan();
    ASSERT_TRUE(step);
    std::vector<StepResult> results;
    bool poisoned = false;
    for (const auto& [rank, plan] : step->plans) {
      results.push_back(workers_[rank].Run(plan));
      poisoned |= !results.back().error.empty();
    }
    if (poisoned) {
      ++kills;
      End({}, /*expert_lost=*/true);
      Install({{1}, {2}}, /*forget=*/false);
    } else {
      for (const StepResult& result : results) Apply(result);
    }
    Receive();
  }
  EXPECT_EQ(kills, 3);
  EXPECT_EQ(Result(id).last.reason, FinishReason::kError);
  for (const auto& [good_id, r] : good) ExpectRight(good_id, r);
  EXPECT_EQ(core_->Stats().moved_sequences, 0u);
}

TEST_F(CoreEpochTest, ComputingAgainBelowTheHighestPositionIsNoProgress) {
  options_.max_num_batched_tokens = 4;
  Install({{1}});
  const Request request = MakeRequest(Prompt(16), 8);
  const RequestId id = Submit(request);
  for (int32_t i = 0; i < 6; ++i) Step();  // prefilled, some tokens drawn
  for (uint64_t worker = 2; worker < 5; ++worker) {
    ASSERT_FALSE(Result(id).last.finished);
    ASSERT_TRUE(Plan());
    End({worker - 1});
    Install({{worker}});
    Step();  // four positions again
  }
  EXPECT_TRUE(Result(id).last.finished);
  EXPECT_EQ(Result(id).last.reason, FinishReason::kError);
}

TEST_F(CoreEpochTest, DeathsWithProgressBetweenThemFailNobody) {
  Install({{1}});
  const Request request = MakeRequest(Prompt(16), 12);
  const RequestId id = Submit(request);
  for (uint64_t worker = 2; !core_->idle(); ++worker) {
    Step();
    if (!Plan()) break;
    End({worker - 1});
    Install({{worker}});
  }
  ExpectRight(id, request);
}

TEST_F(CoreEpochTest, UnavailableEndsEverything) {
  Install({{1}});
  const RequestId a = Submit(MakeRequest(Prompt(16), 12));
  Step();
  const RequestId b = Submit(MakeRequest(Prompt(16), 12));
  End({1});
  core_->BecomeUnavailable(absl::UnavailableError("no attention worker for 60 s"));
  Receive();
  EXPECT_TRUE(core_->idle());
  EXPECT_TRUE(core_->Stats().unavailable);
  for (RequestId id : {a, b}) {
    EXPECT_EQ(Result(id).last.error.message(), "no attention worker for 60 s");
  }
  Install({{2}});
  EXPECT_FALSE(core_->Stats().unavailable);
  const Request request = MakeRequest(Prompt(16), 3);
  const RequestId c = Submit(request);
  RunUntilIdle();
  ExpectRight(c, request);
}

TEST_F(CoreEpochTest, ASequenceThatOutgrowsASmallWorkerMovesToALargerOne) {
  model_.num_kv_blocks = 10;
  Install({{1, 4}, {2, 10}});
  const Request large = MakeRequest(Prompt(24, 300), 2), grows = MakeRequest(Prompt(14), 12);
  const RequestId a = Submit(large);
  EXPECT_EQ(Step()->plans[0].first, 1);  // fits the larger one only
  const RequestId b = Submit(grows);
  EXPECT_EQ(Step()->plans[0].first, 0);
  RunUntilIdle();
  ExpectRight(a, large);
  ExpectRight(b, grows);
  EXPECT_EQ(core_->Stats().preemptions, 1u);
}

TEST_F(CoreEpochTest, WhatFitsNoWorkerWaitsAndOthersOvertake) {
  model_.num_kv_blocks = 10;
  Install({{1, 4}});
  const Request large = MakeRequest(Prompt(30), 2, 2), small = MakeRequest(Prompt(5), 4);
  const RequestId a = Submit(large), b = Submit(small);
  for (int32_t i = 0; i < 6; ++i) Step();
  ExpectRight(b, small);
  EXPECT_FALSE(Step());
  EXPECT_EQ(core_->Stats().waiting, 2);
  Pause();
  Install({{1, 4}, {2, 10}});
  RunUntilIdle();
  ExpectRight(a, large, 0);
  ExpectRight(a, large, 1);
}

TEST_F(CoreEpochTest, ChoicesComputeTheirSharedPromptOnceMoreAfterItsWorkerLeft) {
  Install({{1}});
  const Request request = MakeRequest(Prompt(18), 6, 4);
  const RequestId id = Submit(request);
  Step();
  Step();
  Pause();
  Install({{2}, {3}});
  EXPECT_EQ(core_->Stats().moved_sequences, 4u);
  const auto step = Step();
  EXPECT_EQ(step->plans.size(), 1u);
  EXPECT_EQ(Rows(*step), 20);  // 18 and what was drawn
  RunUntilIdle();
  for (int32_t choice = 0; choice < 4; ++choice) ExpectRight(id, request, choice);
}

TEST_F(CoreEpochTest, CancelsWorkAtAnyPoint) {
  Install({{1}, {2}});
  const RequestId a = Submit(MakeRequest(Prompt(16, 100), 12));
  const RequestId b = Submit(MakeRequest(Prompt(16, 200), 12));
  Step();
  Plan();
  core_->Cancel(a);
  End({1});
  core_->Cancel(b);
  core_->CheckIntegrity();
  EXPECT_TRUE(core_->idle());
  EXPECT_EQ(core_->Stats().kv_usage, 0);
  Install({{2}}, /*forget=*/false);
  const Request request = MakeRequest(Prompt(16), 3);
  const RequestId c = Submit(request);
  RunUntilIdle();
  ExpectRight(c, request);
  EXPECT_EQ(workers_[0].num_known(), 1u);  // told of b's end
}

}  // namespace
}  // namespace switchyard
