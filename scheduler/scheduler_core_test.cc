#include "scheduler/scheduler_core.h"

#include <gtest/gtest.h>

#include "scheduler/core_fixture.h"

namespace switchyard {
namespace {

TEST_F(SchedulerCoreTest, SaysWhyARequestCanNeverRun) {
  model_.num_kv_blocks = 10;
  Make();
  const auto message = [&](const Request& r) {
    const absl::Status status = core_->Validate(r);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_EQ(
      message(MakeRequest(Prompt(41), 1)),
      "the prompt has 41 tokens and needs 11 KV blocks, an attention worker has 10 of 4 tokens");
  EXPECT_NE(message(MakeRequest(Prompt(200), 1)).find("200 tokens, the context holds 200"),
            std::string::npos);
  EXPECT_NE(message(MakeRequest({1, 1000}, 1)).find("token id 1000"), std::string::npos);
  EXPECT_NE(message(MakeRequest({1, -1}, 1)).find("token id -1"), std::string::npos);
  message(MakeRequest({}, 1));
  message(MakeRequest({1}, -1));
  message(MakeRequest({1}, 1, 0));
  Request profiled = MakeRequest({1}, 1);
  profiled.choices[0].routing_profile = 3;
  EXPECT_TRUE(core_->Validate(profiled).ok());
  profiled.choices[0].routing_profile = 4;
  EXPECT_EQ(message(profiled), "routing profile 4 does not exist, the model has 4");
  EXPECT_TRUE(core_->Validate(MakeRequest(Prompt(40), 1)).ok());
}

TEST_F(SchedulerCoreTest, EndsAtTheContextAndAtTheCache) {
  model_.max_model_len = 20;
  Make();
  const RequestId a = Submit(MakeRequest(Prompt(15), 1000));
  RunUntilIdle();
  EXPECT_EQ(Result(a).tokens.size(), 5u);
  EXPECT_EQ(Result(a).last.reason, FinishReason::kLength);

  model_.num_kv_blocks = 4;  // 16 positions; the last token needs none
  workers_.clear();
  seen_.clear();
  Make();
  const RequestId b = Submit(MakeRequest(Prompt(15), 1000));
  RunUntilIdle();
  EXPECT_EQ(Result(b).tokens.size(), 2u);
}

TEST_F(SchedulerCoreTest, StopsByIdButNotBeforeMinTokens) {
  model_.vocab_size = 8;
  Make();
  Request request = MakeRequest({1, 2, 3}, 100);
  request.stop_token_ids = {0, 1, 2, 3};
  const RequestId a = Submit(request);
  request.choices[0].min_tokens = 12;
  const RequestId b = Submit(request);
  RunUntilIdle();
  ExpectRight(b, request);
  request.choices[0].min_tokens = 0;
  ExpectRight(a, request);
  EXPECT_GT(Result(b).tokens.size(), 12u);
  EXPECT_EQ(Result(b).last.reason, FinishReason::kStop);
}

TEST_F(SchedulerCoreTest, MaxTokensZeroComputesThePromptOnly) {
  options_.max_num_batched_tokens = 4;
  Make();
  Request request = MakeRequest(Prompt(10), 0);
  request.choices[0].num_prompt_logprobs = 2;
  const RequestId id = Submit(request);
  EXPECT_EQ(RunUntilIdle(), 3);
  EXPECT_TRUE(Result(id).tokens.empty());
  EXPECT_EQ(Result(id).prompt_logprobs, 9u);
  EXPECT_EQ(Result(id).last.reason, FinishReason::kLength);
}

TEST_F(SchedulerCoreTest, ACachedPromptComputesItsLastBlock) {
  Make();
  const Request request = MakeRequest(Prompt(16), 3);
  const RequestId a = Submit(request);
  RunUntilIdle();
  const RequestId b = Submit(request);
  EXPECT_EQ(Rows(*Step()), 4);
  RunUntilIdle();
  EXPECT_EQ(Result(a).last.cached_tokens, 0);
  EXPECT_EQ(Result(b).last.cached_tokens, 12);
  ExpectRight(a, request);
  ExpectRight(b, request);
  EXPECT_EQ(core_->Stats().cached_tokens, 12u);
  EXPECT_EQ(core_->Stats().prompt_tokens, 32u);
}

TEST_F(SchedulerCoreTest, OtherSaltsProfilesAndPromptLogprobsDoNotReadTheCache) {
  Make();
  const Request request = MakeRequest(Prompt(16), 3);
  Submit(request);
  RunUntilIdle();
  Request salted = request, profiled = request, echoed = request;
  salted.cache_salt = "tenant";
  profiled.choices[0].routing_profile = 3;
  echoed.choices[0].num_prompt_logprobs = 0;
  for (const Request& r : {salted, profiled, echoed}) {
    const RequestId id = Submit(r);
    RunUntilIdle();
    EXPECT_EQ(Result(id).last.cached_tokens, 0);
    ExpectRight(id, r);
  }
  const RequestId again = Submit(salted);
  RunUntilIdle();
  EXPECT_EQ(Result(again).last.cached_tokens, 12);
}

TEST_F(SchedulerCoreTest, NoCacheWhenSwitchedOff) {
  options_.enable_prefix_caching = false;
  Make();
  const Request request = MakeRequest(Prompt(16), 3);
  for (int32_t i = 0; i < 2; ++i) {
    const RequestId id = Submit(request);
    RunUntilIdle();
    EXPECT_EQ(Result(id).last.cached_tokens, 0);
  }
}

TEST_F(SchedulerCoreTest, ChoicesShareThePromptOnOneWorker) {
  Make(3);
  const Request request = MakeRequest(Prompt(18), 4, 5);
  const RequestId id = Submit(request);
  const auto first = Step();
  EXPECT_EQ(Rows(*first), 18);  // one choice computes the prompt
  const auto second = Step();
  ASSERT_EQ(second->plans.size(), 1u);
  EXPECT_EQ(second->plans[0].first, first->plans[0].first);
  EXPECT_EQ(Rows(*second), 1 + 4 * 2);
  RunUntilIdle();
  for (int32_t choice = 0; choice < 5; ++choice) ExpectRight(id, request, choice);
}

TEST_F(SchedulerCoreTest, TheNextChoiceLeadsWhenTheFirstIsCancelled) {
  options_.max_num_batched_tokens = 8;
  Make();
  const Request request = MakeRequest(Prompt(18), 4, 2);
  const RequestId id = Submit(request);
  Step();
  core_->CancelChoice(id, 0);
  RunUntilIdle();
  ExpectRight(id, request, 1);
  EXPECT_FALSE(Result(id, 0).last.finished);
}

TEST_F(SchedulerCoreTest, SpreadsOverWorkersAndPrefersTheOneWithThePrefix) {
  Make(2);
  Submit(MakeRequest(Prompt(16, 100), 1));
  Submit(MakeRequest(Prompt(16, 200), 1));
  auto step = Step();
  ASSERT_EQ(step->plans.size(), 2u);
  EXPECT_EQ(step->plans[0].second.header.participants, (std::vector<int32_t>{0, 1}));
  Submit(MakeRequest(Prompt(20, 200), 1));
  step = Step();
  ASSERT_EQ(step->plans.size(), 1u);
  EXPECT_EQ(step->plans[0].first, 1);
  EXPECT_EQ(Rows(*step), 4);
}

TEST_F(SchedulerCoreTest, PreemptsTheYoungestAndKeepsItsTokens) {
  options_.enable_prefix_caching = false;
  model_.num_kv_blocks = 6;
  Make();
  const Request request = MakeRequest(Prompt(8), 12), other = MakeRequest(Prompt(8, 50), 12);
  const RequestId a = Submit(request), b = Submit(other);
  size_t tokens_before = 0;
  while (core_->Stats().preemptions == 0) {
    tokens_before = Result(b).tokens.size();
    ASSERT_TRUE(Step());
  }
  EXPECT_GT(tokens_before, 0u);
  EXPECT_FALSE(Result(a).last.finished);
  EXPECT_EQ(core_->Stats().running, 1);
  // It comes back from position 0, as another run that begins with all its tokens.
  std::optional<SequenceWork> again;
  while (!again) {
    const auto step = Step();
    ASSERT_TRUE(step);
    for (const SequenceWork& work : step->plans[0].second.work) {
      if (work.begin) again = work;
    }
  }
  EXPECT_EQ(again->run, 1u);
  EXPECT_EQ(again->start, 0);
  EXPECT_EQ(again->begin->prompt_length, 8);
  EXPECT_EQ(again->begin->tokens.size(), 8 + tokens_before);
  RunUntilIdle();
  ExpectRight(a, request);
  ExpectRight(b, other);
}

TEST_F(SchedulerCoreTest, PreemptionScoresOnlyThePromptLogprobsThatAreMissing) {
  for (const bool caching : {true, false}) {
    SCOPED_TRACE(caching);
    options_.enable_prefix_caching = caching;
    options_.max_num_batched_tokens = 5;
    model_.num_kv_blocks = 12;
    workers_.clear();
    seen_.clear();
    Make();
    const Request first = MakeRequest(Prompt(8, 300), 30);
    Request echoed = MakeRequest(Prompt(32), 12), other = MakeRequest(Prompt(30, 100), 8);
    echoed.choices[0].num_prompt_logprobs = 0;
    other.choices[0].num_prompt_logprobs = 0;
    const RequestId a = Submit(first), b = Submit(echoed), c = Submit(other);
    RunUntilIdle();
    EXPECT_GT(core_->Stats().preemptions, 0u);
    ExpectRight(a, first);
    ExpectRight(b, echoed);
    ExpectRight(c, other);
    EXPECT_EQ(Result(b).prompt_logprobs, 31u);
    EXPECT_EQ(Result(c).prompt_logprobs, 29u);
    EXPECT_EQ(workers_[0].num_scored(), 31u + 29u);
  }
}

TEST_F(SchedulerCoreTest, LongPromptsGetOnUnderDecodeLoad) {
  options_.max_num_batched_tokens = 8;
  options_.max_num_seqs = 64;
  model_.num_kv_blocks = 1000;
  Make();
  for (int32_t i = 0; i < 20; ++i) Submit(MakeRequest({i + 1}, 60));
  for (int32_t i = 0; i < 40; ++i) Step();
  const RequestId id = Submit(MakeRequest(Prompt(40), 2));
  int32_t steps = 0;
  while (!Result(id).last.finished && steps < 60) {
    Submit(MakeRequest({500}, 60));  // more load behind it
    Step();
    ++steps;
  }
  EXPECT_LT(steps, 60);
  RunUntilIdle();
}

TEST_F(SchedulerCoreTest, NoSplitPromptBlocksDecodes) {
  options_.max_num_batched_tokens = 8;
  Make();
  const RequestId a = Submit(MakeRequest({1}, 30));
  Step();
  Submit(MakeRequest(Prompt(100), 1));
  for (size_t i = 2; i < 12; ++i) {
    EXPECT_EQ(Rows(*Step()), 8);
    EXPECT_EQ(Result(a).tokens.size(), i);  // one token each step
  }
}

TEST_F(SchedulerCoreTest, APoisonedRequestFailsAloneAndTheOthersFinish) {
  Make();
  std::vector<std::pair<RequestId, Request>> good;
  for (int32_t i = 0; i < 5; ++i) {
    const Request r = MakeRequest(Prompt(9, 20 * i), 6);
    good.emplace_back(Submit(r), r);
  }
  Step();
  Request bad = MakeRequest(Prompt(7), 6);
  bad.choices[0].seed = 666;
  const RequestId id = Submit(bad);
  RunUntilIdle();
  EXPECT_EQ(Result(id).last.reason, FinishReason::kError);
  EXPECT_EQ(Result(id).last.error.code(), absl::StatusCode::kInternal);
  for (const auto& [good_id, r] : good) ExpectRight(good_id, r);
  EXPECT_EQ(core_->Stats().worker_errors, 3u);
}

TEST_F(SchedulerCoreTest, AnErrorStrikesOnlyItsWorkersSequences) {
  Make(2);
  const Request ra = MakeRequest(Prompt(8, 100), 8), rb = MakeRequest(Prompt(8, 200), 8);
  const RequestId a = Submit(ra), b = Submit(rb);
  Step();
  const auto fails = [](int32_t worker) { return worker == 1; };
  Step(fails);
  EXPECT_EQ(Result(a).tokens.size(), 2u);
  EXPECT_EQ(Result(b).tokens.size(), 1u);
  Step(fails);
  // Two strikes: b runs alone.
  auto step = Step();
  ASSERT_EQ(step->plans.size(), 1u);
  EXPECT_EQ(step->plans[0].first, 1);
  EXPECT_EQ(Result(a).tokens.size(), 3u);
  EXPECT_EQ(Result(b).tokens.size(), 2u);
  // It got on: no strikes are left.
  step = Step(fails);
  EXPECT_EQ(step->plans.size(), 2u);
  RunUntilIdle();
  ExpectRight(a, ra);
  ExpectRight(b, rb);
}

TEST_F(SchedulerCoreTest, AnErrorTellsTheWorkerEverythingAnew) {
  Make();
  const Request request = MakeRequest(Prompt(8), 8);
  const RequestId id = Submit(request);
  Step();
  Step();
  Step([](int32_t) { return true; });
  const auto step = Step();
  const StepPlan& plan = step->plans[0].second;
  ASSERT_EQ(plan.ended.size(), 1u);
  ASSERT_TRUE(plan.work[0].begin);
  EXPECT_EQ(plan.work[0].begin->tokens.size(), 10u);
  EXPECT_EQ(plan.work[0].start, 9);  // its KV is still there
  EXPECT_EQ(plan.work[0].block_table_start, 0);
  EXPECT_EQ(plan.work[0].new_blocks.size(), 3u);
  RunUntilIdle();
  ExpectRight(id, request);
}

TEST_F(SchedulerCoreTest, GivesUpWorkersThatOnlyFail) {
  Make();
  const auto fails = [](int32_t) { return true; };
  for (int32_t i = 0; i < 600; ++i) Submit(MakeRequest({1}, 1));
  for (int32_t i = 0; i < 512; ++i) Step(fails);
  EXPECT_FALSE(core_->failed());
  EXPECT_FALSE(core_->idle());
  Step(fails);
  EXPECT_TRUE(core_->failed());
  EXPECT_TRUE(core_->idle());
  EXPECT_EQ(Result(600).last.error.code(), absl::StatusCode::kUnavailable);
}

TEST_F(SchedulerCoreTest, GivesUpAtOnceWhenAWorkerCannotGoOn) {
  Make();
  const RequestId id = Submit(MakeRequest(Prompt(5), 3));
  Step([](int32_t) { return true; }, /*fatal=*/true);
  EXPECT_TRUE(core_->failed());
  EXPECT_TRUE(core_->idle());
  EXPECT_EQ(Result(id).last.error.message(), "the workers failed: lost");
}

TEST_F(SchedulerCoreTest, AWrongAnswerCountsAsAnError) {
  Make();
  const Request request = MakeRequest(Prompt(5), 3);
  const RequestId id = Submit(request);
  for (int32_t kind = 0; kind < 3; ++kind) {
    core_->Admit();
    auto step = core_->Plan(++now_);
    StepResult result = workers_[0].Run(step->plans[0].second);
    if (kind == 0) result.results.clear();
    if (kind == 1) result.results[0].token = model_.vocab_size;
    if (kind == 2) break;
    core_->Apply(result, ++now_);
  }
  EXPECT_EQ(core_->Stats().worker_errors, 2u);
  core_->Cancel(id);
  EXPECT_TRUE(core_->idle());
  EXPECT_TRUE(core_->step_in_flight());
  EXPECT_EQ(core_->Stats().kv_usage, 0);
}

TEST_F(SchedulerCoreTest, LogitsThatAreNotFiniteFailOnlyTheirRequest) {
  Make();
  Request bad = MakeRequest(Prompt(6), 8, 2);
  bad.choices[1].seed = 777;
  const Request good = MakeRequest(Prompt(6, 50), 8);
  const RequestId a = Submit(bad), b = Submit(good);
  RunUntilIdle();
  for (int32_t choice = 0; choice < 2; ++choice) {
    EXPECT_EQ(Result(a, choice).last.reason, FinishReason::kError);
  }
  ExpectRight(b, good);
  EXPECT_EQ(core_->Stats().worker_errors, 0u);
}

TEST_F(SchedulerCoreTest, CancelFreesBlocksAtOnceAndTellsTheWorker) {
  Make();
  const RequestId a = Submit(MakeRequest(Prompt(30), 50));
  const RequestId b = Submit(MakeRequest(Prompt(10, 100), 50));
  Step();
  core_->Cancel(a);
  core_->CheckIntegrity();
  EXPECT_DOUBLE_EQ(core_->Stats().kv_usage, 3.0 / 50);
  Step();
  EXPECT_EQ(workers_[0].num_known(), 1u);
  core_->Cancel(b);
  EXPECT_TRUE(core_->idle());
  EXPECT_FALSE(Step());
}

TEST_F(SchedulerCoreTest, SlotsGenerationRisesWhenAParticipantMissedAStep) {
  Make(2);
  const auto generation = [&](const std::optional<SchedulerCore::Step>& step) {
    return step->plans[0].second.header.slots_generation;
  };
  Submit(MakeRequest(Prompt(8, 100), 8));
  EXPECT_EQ(generation(Step()), 1u);
  EXPECT_EQ(generation(Step()), 1u);
  Submit(MakeRequest(Prompt(8, 200), 3));
  const auto step = Step();
  EXPECT_EQ(step->plans.size(), 2u);
  EXPECT_EQ(generation(step), 2u);
  EXPECT_EQ(generation(Step()), 2u);
  EXPECT_EQ(generation(Step()), 2u);
  EXPECT_EQ(generation(Step()), 2u);  // one left: it was there all along
  EXPECT_EQ(generation(Step([](int32_t) { return true; })), 2u);
  EXPECT_EQ(generation(Step()), 3u);  // after an aborted step
}

}  // namespace
}  // namespace switchyard
