// For the tests of the SchedulerCore: a core over fake workers, driven step by step; what the
// requests received is collected. Tests only.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "scheduler/fake_worker.h"
#include "scheduler/scheduler_core.h"
#include "spdlog/spdlog.h"

namespace switchyard {

class SchedulerCoreTest : public testing::Test {
 protected:
  SchedulerCoreTest() {
    spdlog::set_level(spdlog::level::off);
    model_.vocab_size = 1000;
    model_.max_model_len = 200;
    model_.block_size = 4;
    model_.num_kv_blocks = 50;
    model_.num_routing_profiles = 4;
    options_.max_steps_in_flight = 1;  // the specification
  }

  void Make(int32_t num_workers = 1) {
    core_ = std::make_unique<SchedulerCore>(options_, model_);
    core_->Install(FirstEpoch(model_, num_workers));
    for (int32_t w = 0; w < num_workers; ++w) workers_.emplace_back(model_, w);
  }

  static std::vector<int32_t> Prompt(int32_t length, int32_t first = 10) {
    std::vector<int32_t> prompt(length);
    std::iota(prompt.begin(), prompt.end(), first);
    return prompt;
  }

  static Request MakeRequest(std::vector<int32_t> prompt, int32_t max_tokens, int32_t n = 1) {
    Request request;
    request.prompt = std::move(prompt);
    request.max_tokens = max_tokens;
    for (int32_t i = 0; i < n; ++i) {
      SamplingParams sampling;
      sampling.seed = 5;
      sampling.choice = i;
      request.choices.push_back(sampling);
    }
    return request;
  }

  RequestId Submit(Request request) {
    EXPECT_TRUE(core_->Validate(request).ok()) << core_->Validate(request);
    const RequestId id = next_id_++;
    core_->Submit(id, std::move(request));
    return id;
  }

  // Admit and Plan; workers run it unless `fails` says that theirs is to be an error.
  std::optional<SchedulerCore::Step> Step(const std::function<bool(int32_t worker)>& fails = {},
                                          bool fatal = false) {
    auto step = Plan();
    if (!step) return step;
    for (const auto& [worker, plan] : step->plans) {
      StepResult result = workers_[worker].Run(plan);
      if (fails && fails(worker)) {
        result.error = "lost";
        result.fatal = fatal;
        result.results.clear();
      }
      Apply(result);
    }
    Receive();
    return step;
  }
  // The parts of Step.
  std::optional<SchedulerCore::Step> Plan() {
    core_->Admit();
    auto step = core_->Plan(++now_);
    core_->CheckIntegrity();
    return step;
  }
  void Apply(const StepResult& result) {
    core_->Apply(result, ++now_);
    core_->CheckIntegrity();
  }
  void Receive() {
    for (SchedulerCore::Delivery& delivery : core_->TakeDeliveries()) {
      for (ChoiceEvent& event : delivery.events) {
        Seen& seen = seen_[{event.request, event.choice}];
        EXPECT_FALSE(seen.last.finished);
        seen.tokens.insert(seen.tokens.end(), event.tokens.begin(), event.tokens.end());
        seen.prompt_logprobs += event.prompt_logprobs.size();
        seen.last = std::move(event);
      }
    }
  }
  int32_t RunUntilIdle() {
    int32_t steps = 0;
    for (; !core_->idle() && steps < 10000; ++steps) Step();
    EXPECT_TRUE(core_->idle());
    return steps;
  }
  static int32_t Rows(const SchedulerCore::Step& step) {
    int32_t rows = 0;
    for (const auto& [worker, plan] : step.plans) {
      for (const SequenceWork& work : plan.work) rows += work.count;
    }
    return rows;
  }

  struct Seen {
    std::vector<int32_t> tokens;
    size_t prompt_logprobs = 0;
    ChoiceEvent last;
  };
  const Seen& Result(RequestId id, int32_t choice = 0) { return seen_[{id, choice}]; }
  void ExpectRight(RequestId id, const Request& request, int32_t choice = 0) {
    const ExpectedChoice expected =
        Expect(request.prompt, request.choices[choice], request.stop_token_ids,
               static_cast<int32_t>(request.prompt.size()) + request.max_tokens, model_.vocab_size);
    const Seen& seen = Result(id, choice);
    EXPECT_TRUE(seen.last.finished);
    EXPECT_EQ(seen.tokens, expected.tokens);
    EXPECT_EQ(seen.last.reason, expected.stopped ? FinishReason::kStop : FinishReason::kLength);
  }

  SchedulerOptions options_;
  ModelInfo model_;
  std::unique_ptr<SchedulerCore> core_;
  std::vector<FakeWorker> workers_;
  std::map<std::pair<RequestId, int32_t>, Seen> seen_;
  RequestId next_id_ = 1;
  SchedulerCore::TimePoint now_{std::chrono::seconds(1)};
};

}  // namespace switchyard
