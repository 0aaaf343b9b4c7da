// For the simulation tests: random requests on a virtual clock, and the check
// that each ends exactly once with the tokens that its prompt alone determines.
// What the workers do is left to the test.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <random>
#include <vector>

#include "scheduler/fake_worker.h"
#include "scheduler/scheduler_core.h"

namespace switchyard {

struct CellConfig {
  SchedulerOptions options;
  ModelInfo model;
  int32_t max_workers = 1;
  double error_rate = 0;   // a worker answers a step with an error
  double poison_rate = 0;  // a request breaks every step that it is in
  double cancel_rate = 0;
  double submit_rate = 0.3;
  int32_t max_live = 24;
};

struct Totals {
  uint64_t epochs = 0, pauses = 0, lost = 0, moved = 0, unavailable = 0;
  uint64_t steps = 0, preemptions = 0, cached = 0, cancelled = 0, finished = 0, failed = 0,
           errors = 0;
  uint64_t dropped = 0, max_age = 0;

  void Add(const Totals& t) {
    epochs += t.epochs;
    pauses += t.pauses;
    lost += t.lost;
    moved += t.moved;
    unavailable += t.unavailable;
    steps += t.steps;
    preemptions += t.preemptions;
    cached += t.cached;
    cancelled += t.cancelled;
    finished += t.finished;
    failed += t.failed;
    errors += t.errors;
    dropped += t.dropped;
    max_age = std::max(max_age, t.max_age);
  }
};

class Simulation {
 public:
  Simulation(const CellConfig& config, uint64_t seed)
      : config_(config), random_(seed), core_(config.options, config.model) {}
  virtual ~Simulation() = default;

  void Run(int32_t num_steps, Totals* totals) {
    while (num_steps > 0 && !testing::Test::HasFailure()) {
      while (static_cast<int32_t>(live_.size()) < config_.max_live && Chance(config_.submit_rate))
        Submit();
      num_steps -= RunStep();
    }
    // No more requests: everything must end, soon.
    Settle();
    int32_t left = 200000;
    while (!core_.idle() && left > 0 && !testing::Test::HasFailure()) left -= RunStep();
    EXPECT_TRUE(core_.idle());
    EXPECT_TRUE(live_.empty());
    const SchedulerStats stats = core_.Stats();
    EXPECT_EQ(stats.kv_usage, 0);
    EXPECT_FALSE(stats.failed);
    totals_.steps += stats.steps;
    totals_.preemptions += stats.preemptions;
    totals_.cached += stats.cached_tokens;
    totals_.dropped += stats.dropped_results;
    totals_.lost += stats.lost_steps;
    totals_.moved += stats.moved_sequences;
    TakeLeftQueue();
    EXPECT_EQ(queued_requests_, 0);
    EXPECT_EQ(queued_tokens_, 0);
    totals->Add(totals_);
  }

 protected:
  struct LiveChoice {
    SequenceId sequence = 0;
    ExpectedChoice expected;
    size_t received = 0;
    bool ended = false;
    bool may_fail = false;
    int32_t hits = 0;  // strikes, at most: lost steps since it received tokens
  };
  struct Live {
    Request request;
    std::vector<LiveChoice> choices;
    uint64_t submitted = 0;
  };

  // One round: a step, if there is something to do. Returns 1.
  virtual int32_t RunStep() = 0;
  virtual void Settle() {}  // nothing is submitted any more
  // Whether the cell is such that requests may end with an error.
  virtual bool MayFail(const SamplingParams& sampling) const = 0;

  bool Chance(double p) { return std::uniform_real_distribution<>(0, 1)(random_) < p; }
  int32_t Between(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random_);
  }

  Request MakeRequest() {
    const int32_t capacity = config_.model.block_size * config_.model.num_kv_blocks;
    const int32_t longest = std::min(capacity, config_.model.max_model_len - 1);
    Request request;
    // A few common beginnings, so that prefixes repeat.
    const int32_t family = Between(0, 3);
    const int32_t length = Chance(0.1) ? longest : Between(1, std::min(longest, 60));
    const int32_t common = Between(0, length);
    for (int32_t i = 0; i < length; ++i) {
      request.prompt.push_back(i < common ? (family * 31 + i * 7) % config_.model.vocab_size
                                          : Between(0, config_.model.vocab_size - 1));
    }
    request.max_tokens = Chance(0.05) ? 0 : Chance(0.05) ? 100000 : Between(1, 40);
    const int32_t num_choices = Chance(0.2) ? Between(2, 5) : 1;
    SamplingParams sampling;
    sampling.num_logprobs = Chance(0.3) ? 0 : -1;
    sampling.num_prompt_logprobs = Chance(0.1) ? 0 : -1;
    sampling.min_tokens = Chance(0.2) ? Between(0, 20) : 0;
    sampling.routing_profile = Chance(0.1) ? 1 : 0;
    sampling.seed = Between(0, 600);
    if (Chance(config_.poison_rate)) sampling.seed = 666;
    if (Chance(0.02)) sampling.seed = 777;
    for (int32_t i = 0; i < num_choices; ++i) {
      sampling.choice = i;
      request.choices.push_back(sampling);
    }
    if (Chance(0.5)) request.stop_token_ids = {1, 2, 3};
    return request;
  }

  void Submit() {
    Live live;
    live.request = MakeRequest();
    const Request& r = live.request;
    if (!core_.Validate(r).ok()) {
      ADD_FAILURE() << core_.Validate(r).message();
      return;
    }
    const int64_t length = static_cast<int64_t>(r.prompt.size());
    const int64_t capacity = int64_t{config_.model.block_size} * config_.model.num_kv_blocks;
    const int64_t limit =
        std::min({length + r.max_tokens, int64_t{config_.model.max_model_len}, capacity + 1});
    for (const SamplingParams& s : r.choices) {
      LiveChoice choice;
      choice.expected = Expect(r.prompt, s, r.stop_token_ids, static_cast<int32_t>(limit),
                               config_.model.vocab_size);
      choice.sequence = next_sequence_++;
      choice.may_fail = FakeModel::NonFinite(s) || MayFail(s);
      live.choices.push_back(std::move(choice));
    }
    live.submitted = steps_;
    const RequestId id = next_request_++;
    ++queued_requests_;
    queued_tokens_ += length * static_cast<int64_t>(live.request.choices.size());
    core_.Submit(id, live.request);
    live_.emplace(id, std::move(live));
  }

  void MaybeCancel() {
    if (live_.empty() || !Chance(config_.cancel_rate)) return;
    auto it = live_.begin();
    std::advance(it, Between(0, static_cast<int32_t>(live_.size()) - 1));
    ++totals_.cancelled;
    const int32_t num_choices = static_cast<int32_t>(it->second.choices.size());
    if (Chance(0.5)) {
      core_.Cancel(it->first);
      live_.erase(it);
    } else {
      const int32_t choice = Between(0, num_choices - 1);
      core_.CancelChoice(it->first, choice);
      it->second.choices[choice].ended = true;
      EraseIfEnded(it->first);
    }
    core_.Cancel(next_request_ + 5);  // unknown
    core_.CheckIntegrity();
  }

  void EraseIfEnded(RequestId id) {
    const auto& choices = live_.at(id).choices;
    if (std::all_of(choices.begin(), choices.end(), [](const auto& c) { return c.ended; })) {
      totals_.max_age = std::max(totals_.max_age, steps_ - live_.at(id).submitted);
      live_.erase(id);
    }
  }

  void TakeLeftQueue() {
    const auto left = core_.TakeLeftQueue();
    queued_requests_ -= left.requests;
    queued_tokens_ -= left.tokens;
  }

  // The next step, checked; none when there is nothing to plan.
  std::optional<SchedulerCore::Step> AdmitAndPlan() {
    core_.Admit();
    core_.CheckIntegrity();
    auto step = core_.Plan(now_);
    core_.CheckIntegrity();
    if (!step) return step;
    ++steps_;
    CheckPlans(*step);
    return step;
  }

  void CheckPlans(const SchedulerCore::Step& step) {
    int32_t rows = 0, sequences = 0;
    std::vector<int32_t> participants;
    for (const auto& [worker, plan] : step.plans) {
      participants.push_back(worker);
      EXPECT_EQ(plan.header.step, step.step);
      for (const SequenceWork& work : plan.work) rows += work.count;
      sequences += static_cast<int32_t>(plan.work.size());
    }
    EXPECT_EQ(step.plans[0].second.header.participants, participants);
    EXPECT_LE(rows, config_.options.max_num_batched_tokens);
    EXPECT_LE(sequences, config_.options.max_num_seqs);
    EXPECT_LE(core_.Stats().running, config_.options.max_num_seqs);
  }

  void Receive() {
    std::vector<RequestId> seen;
    for (const SchedulerCore::Delivery& delivery : core_.TakeDeliveries()) {
      ASSERT_FALSE(delivery.events.empty());
      const RequestId id = delivery.events[0].request;
      EXPECT_EQ(std::count(seen.begin(), seen.end(), id), 0) << "two calls in a step";
      seen.push_back(id);
      ASSERT_TRUE(live_.contains(id)) << "an event after the end";
      for (const ChoiceEvent& event : delivery.events) CheckEvent(live_.at(id), id, event);
      EraseIfEnded(id);
    }
  }

  void CheckEvent(Live& live, RequestId id, const ChoiceEvent& event) {
    ASSERT_EQ(event.request, id);
    LiveChoice& choice = live.choices.at(event.choice);
    const ExpectedChoice& expected = choice.expected;
    ASSERT_FALSE(choice.ended) << "an event after the end";
    ASSERT_LE(choice.received + event.tokens.size(), expected.tokens.size());
    for (size_t i = 0; i < event.tokens.size(); ++i) {
      ASSERT_EQ(event.tokens[i], expected.tokens[choice.received + i]);
      if (!expected.logprobs.empty()) {
        ASSERT_EQ(event.logprobs.at(i).logprob, expected.logprobs[choice.received + i].logprob);
      }
    }
    ASSERT_EQ(event.logprobs.size(), expected.logprobs.empty() ? 0 : event.tokens.size());
    if (event.reason != FinishReason::kError && choice.received == 0) {
      ASSERT_EQ(event.prompt_logprobs.size(), expected.prompt_logprobs.size());
      for (size_t i = 0; i < expected.prompt_logprobs.size(); ++i) {
        ASSERT_EQ(event.prompt_logprobs[i].token, expected.prompt_logprobs[i].token);
        ASSERT_EQ(event.prompt_logprobs[i].logprob, expected.prompt_logprobs[i].logprob);
      }
      ASSERT_NE(event.first_scheduled, SchedulerCore::TimePoint());
      ASSERT_GE(event.prefill_done, event.first_scheduled);
    } else if (!event.prompt_logprobs.empty()) {  // the prompt was scored, and then it failed
      ASSERT_EQ(choice.received, 0u);
      ASSERT_EQ(event.prompt_logprobs.size(), expected.prompt_logprobs.size());
    }
    ASSERT_LT(event.cached_tokens, static_cast<int32_t>(live.request.prompt.size()));
    choice.received += event.tokens.size();
    if (!event.tokens.empty()) choice.hits = 0;
    if (!event.finished) return;
    choice.ended = true;
    if (event.reason == FinishReason::kError) {
      ASSERT_FALSE(event.error.ok());
      ASSERT_TRUE(choice.may_fail || event.error == unavailable_) << event.error;
      totals_.failed += event.error != unavailable_;
      return;
    }
    ASSERT_EQ(choice.received, expected.tokens.size());
    ASSERT_EQ(event.reason, expected.stopped ? FinishReason::kStop : FinishReason::kLength);
    ++totals_.finished;
  }

  const CellConfig config_;
  std::mt19937_64 random_;
  SchedulerCore core_;
  SchedulerCore::TimePoint now_{std::chrono::seconds(1)};
  std::map<RequestId, Live> live_;
  RequestId next_request_ = 1;
  SequenceId next_sequence_ = 1;  // as the core counts
  absl::Status unavailable_;      // with which requests may end just now
  int32_t queued_requests_ = 0;
  int64_t queued_tokens_ = 0;
  uint64_t steps_ = 0;
  Totals totals_;
};

inline CellConfig RandomConfig(uint64_t seed) {
  std::mt19937_64 random(seed * 7919 + 1);
  const auto pick = [&](std::initializer_list<int32_t> values) {
    return values.begin()[random() % values.size()];
  };
  CellConfig c;
  c.model.vocab_size = 50;
  c.model.num_routing_profiles = 2;
  c.model.block_size = pick({1, 2, 4, 16});
  c.model.num_kv_blocks = pick({1, 2, 5, 12, 40, 100});
  c.model.max_model_len = pick({20, 100, 300});
  c.max_workers = pick({1, 1, 2, 3, 5});
  c.options.max_num_seqs = pick({1, 2, 5, 16});
  c.options.max_num_batched_tokens = pick({1, 2, 5, 16, 64, 256});
  c.options.enable_prefix_caching = random() % 4 != 0;
  c.options.max_steps_in_flight = 1 + seed % 2;
  c.error_rate = random() % 3 == 0 ? 0.02 : 0;
  c.poison_rate = c.error_rate;
  c.cancel_rate = random() % 3 == 0 ? 0 : 0.01 * static_cast<double>(random() % 5);
  c.submit_rate = random() % 2 == 0 ? 0.05 : 0.5;
  c.max_live = pick({2, 8, 24});
  // At least one prompt token and room to draw one.
  c.model.num_kv_blocks = std::max(c.model.num_kv_blocks, 2 / c.model.block_size + 1);
  return c;
}

}  // namespace switchyard
