// Many random cells whose workers come and go: attention workers join, leave
// and are killed, expert workers are killed, between steps and in the middle of
// one. Every request must end exactly once with the tokens that its prompt
// alone determines; only those that break their workers may fail.
#include <gtest/gtest.h>

#include <deque>
#include <memory>
#include <optional>
#include <set>

#include "scheduler/simulation.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

class EpochCell : public Simulation {
 public:
  using Simulation::Simulation;

 private:
  struct Worker {
    uint64_t id = 0;
    int32_t num_blocks = 0;
    FakeWorker fake;
  };
  using Plan = std::pair<int32_t, StepPlan>;  // by rank

  bool MayFail(const SamplingParams& sampling) const override {
    return FakeModel::Poisoned(sampling);
  }
  void Settle() override {
    rate_ = 0;
    if (!installed_) return;
    core_.Pause({epoch_});
    pausing_ = true;
    MaybeRest();
  }

  // Until a step is complete, with as many in flight as the core plans, or the epoch is over.
  int32_t RunStep() override {
    now_ += std::chrono::milliseconds(Between(0, 30));
    MaybeCancel();
    if (!installed_) {
      WithoutEpoch();
      return 1;
    }
    if (Chance(0.01 * rate_)) {
      StartPause();
      MaybeRest();
    } else if (plans_.empty() && Chance(0.01 * rate_)) {
      End(RandomDeaths());  // nothing is in flight
    }
    PlanSteps();
    if (plans_.empty() && installed_) CheckNothingFits();
    for (bool done = plans_.empty(); !done && !testing::Test::HasFailure();) done = Answer();
    Receive();
    MaybeRest();
    TakeLeftQueue();
    return 1;
  }

  // ---- steps ----

  void PlanSteps() {
    while (core_.CanPlan() && (!core_.step_in_flight() || Chance(0.9))) {
      auto step = AdmitAndPlan();
      if (!step) return;
      EXPECT_TRUE(installed_ && !pausing_);
      const StepHeader& header = step->plans[0].second.header;
      EXPECT_EQ(header.epoch, epoch_);
      EXPECT_GE(header.slots_generation, generation_ + new_epoch_);
      generation_ = header.slots_generation;
      new_epoch_ = 0;
      for (auto& entry : step->plans) plans_.push_back(std::move(entry));
    }
  }

  // Some worker answers the oldest plan that it has, or somebody dies. True when that completed a
  // step or ended the epoch.
  bool Answer() {
    if (Chance(0.03 * rate_)) {
      const EpochEnd end = RandomDeaths();
      if (NobodyIsHitTooOften(end)) return LoseSteps(end);
    }
    if (!pausing_ && Chance(0.02 * rate_)) {
      StartPause();
      EXPECT_FALSE(core_.TakePaused());
    }
    const size_t any = static_cast<size_t>(Between(0, static_cast<int32_t>(plans_.size()) - 1));
    const int32_t rank = plans_[any].first;
    const auto oldest = std::ranges::find(plans_, rank, &Plan::first);
    const uint64_t step = oldest->second.header.step;
    const StepResult result = workers_.at(rank)->fake.Run(oldest->second);
    if (!result.error.empty()) {  // a poisoned request
      const bool expert = Chance(0.5);
      const std::vector<uint64_t> lost = {workers_[rank]->id};
      return LoseSteps({.epoch = epoch_,
                        .lost_attention = expert ? std::vector<uint64_t>() : lost,
                        .expert_lost = expert},
                       rank);
    }
    plans_.erase(oldest);
    const bool complete = core_.Apply(result, now_).has_value();
    EXPECT_EQ(complete, std::ranges::none_of(plans_, [&](const Plan& plan) {
                return plan.second.header.step == step;
              }));
    core_.CheckIntegrity();
    if (Chance(0.02)) late_.push_back(result);
    if (!complete) MaybeCancel();
    return complete;
  }

  // The epoch ends with plans that were not answered. Some have run by then; `stuck` has run its
  // oldest, in vain.
  bool LoseSteps(const EpochEnd& end, int32_t stuck = -1) {
    std::set<SequenceId> struck;
    std::set<int32_t> stopped = {stuck};
    for (const auto& [rank, plan] : plans_) {
      if (!stopped.contains(rank)) {
        StepResult result;
        const bool runs = Chance(0.5);
        if (runs) result = workers_.at(rank)->fake.Run(plan);
        if (!runs || !result.error.empty()) {
          stopped.insert(rank);
        } else {
          late_.push_back(std::move(result));
        }
      }
      if (!Strikes(rank, end)) continue;
      for (const SequenceWork& work : plan.work) struck.insert(work.sequence);
    }
    for (SequenceId sequence : struck) {
      if (LiveChoice* choice = Find(sequence)) ++choice->hits;
    }
    plans_.clear();
    End(end);
    return true;
  }

  void StartPause() {
    core_.Pause({epoch_ - 1});
    core_.Pause({epoch_});
    EXPECT_FALSE(core_.Plan(now_));
    pausing_ = true;
  }

  // The pause has come into effect when nothing is in flight.
  void MaybeRest() {
    if (!installed_ || !pausing_) return;
    EXPECT_EQ(core_.step_in_flight(), !plans_.empty());
    const std::optional<uint64_t> paused = core_.TakePaused();
    EXPECT_EQ(paused.has_value(), plans_.empty());
    if (!paused) return;
    EXPECT_EQ(*paused, epoch_);
    ++totals_.pauses;
    installed_ = false;
    pausing_ = false;
  }

  bool Strikes(int32_t rank, const EpochEnd& end) const {
    return end.expert_lost || Contains(end, workers_.at(rank)->id);
  }
  static bool Contains(const EpochEnd& end, uint64_t worker) {
    return std::find(end.lost_attention.begin(), end.lost_attention.end(), worker) !=
           end.lost_attention.end();
  }

  // A third strike is for those who deserve it.
  bool NobodyIsHitTooOften(const EpochEnd& end) {
    for (const auto& [rank, plan] : plans_) {
      if (!Strikes(rank, end)) continue;
      for (const SequenceWork& work : plan.work) {
        const LiveChoice* choice = Find(work.sequence);
        if (choice != nullptr && choice->hits >= 2) return false;
      }
    }
    return true;
  }

  LiveChoice* Find(SequenceId sequence) {
    for (auto& [id, live] : live_) {
      for (LiveChoice& choice : live.choices) {
        if (choice.sequence == sequence && !choice.ended) return &choice;
      }
    }
    return nullptr;
  }

  // Nothing was planned: no worker is large enough for any of the requests.
  void CheckNothingFits() {
    int32_t largest = 0;
    for (const auto& worker : workers_) largest = std::max(largest, worker->num_blocks);
    for (const auto& [id, live] : live_) {
      for (const LiveChoice& choice : live.choices) {
        if (choice.ended) continue;
        EXPECT_GT(live.request.prompt.size() + choice.received,
                  static_cast<size_t>(largest) * config_.model.block_size);
      }
    }
  }

  // ---- epochs ----

  EpochEnd RandomDeaths() {
    EpochEnd end{.epoch = epoch_, .lost_attention = {}, .expert_lost = Chance(0.3)};
    for (const auto& worker : workers_) {
      if (Chance(0.4)) end.lost_attention.push_back(worker->id);
    }
    return end;
  }

  void End(const EpochEnd& end) {
    core_.EndEpoch({.epoch = epoch_ + 1, .lost_attention = {}, .expert_lost = true});
    core_.EndEpoch(end);
    if (Chance(0.1)) core_.EndEpoch(end);
    core_.CheckIntegrity();
    EXPECT_FALSE(core_.step_in_flight());
    EXPECT_FALSE(core_.TakePaused());
    Receive();
    std::erase_if(workers_, [&](const auto& worker) { return Contains(end, worker->id); });
    installed_ = false;
    pausing_ = false;
  }

  void WithoutEpoch() {
    ApplyLate();
    core_.Admit();
    EXPECT_FALSE(core_.Plan(now_));
    core_.CheckIntegrity();
    if (Chance(0.02 * rate_)) BecomeUnavailable();
    if (Chance(0.1 * rate_)) End(RandomDeaths());  // while it rests or is dead already
    if (Chance(0.5)) Install();
    ApplyLate();
  }

  void ApplyLate() {
    while (!late_.empty() && Chance(0.5)) {
      const uint64_t before = core_.Stats().dropped_results;
      EXPECT_FALSE(core_.Apply(late_.back(), now_));
      EXPECT_EQ(core_.Stats().dropped_results, before + 1);
      late_.pop_back();
    }
  }

  void BecomeUnavailable() {
    ++totals_.unavailable;
    unavailable_ = absl::UnavailableError("no worker for too long");
    core_.BecomeUnavailable(unavailable_);
    Receive();
    unavailable_ = absl::OkStatus();
    EXPECT_TRUE(core_.idle());
    EXPECT_TRUE(live_.empty());
    EXPECT_TRUE(core_.Stats().unavailable);
  }

  void Install() {
    std::erase_if(workers_, [&](const auto&) { return Chance(0.15 * rate_); });  // these leave
    const int32_t full = config_.model.num_kv_blocks;
    const bool need_full =
        rate_ == 0 && std::none_of(workers_.begin(), workers_.end(),
                                   [&](const auto& w) { return w->num_blocks == full; });
    if (need_full) Join(full);
    while (workers_.empty() ||
           (static_cast<int32_t>(workers_.size()) < config_.max_workers && Chance(0.4))) {
      Join(Chance(0.6) ? full : Between(1, full));
    }
    std::shuffle(workers_.begin(), workers_.end(), random_);
    EpochView view{.epoch = epoch_ += Between(1, 3), .attention = {}};
    for (size_t rank = 0; rank < workers_.size(); ++rank) {
      Worker& worker = *workers_[rank];
      view.attention.push_back({worker.id, worker.num_blocks});
      worker.fake.Install(epoch_, static_cast<int32_t>(rank), Chance(0.5));
    }
    core_.Install(view);
    core_.CheckIntegrity();
    EXPECT_FALSE(core_.Stats().unavailable);
    installed_ = true;
    new_epoch_ = 1;
    ++totals_.epochs;
  }

  void Join(int32_t num_blocks) {
    ModelInfo model = config_.model;
    model.num_kv_blocks = num_blocks;
    workers_.push_back(
        std::make_unique<Worker>(Worker{next_worker_++, num_blocks, FakeWorker(model, 0)}));
  }

  double rate_ = 1;  // of what nobody asked for
  bool installed_ = false;
  uint64_t epoch_ = 0;
  uint64_t generation_ = 0;  // of slots, in the last step
  uint64_t new_epoch_ = 0;   // 1: no step of this epoch yet
  uint64_t next_worker_ = 1;
  std::vector<std::unique_ptr<Worker>> workers_;  // by rank while an epoch is installed
  std::vector<StepResult> late_;
  std::deque<Plan> plans_;  // of the epoch, not answered, by step
  bool pausing_ = false;
};

TEST(EpochSimulationTest, EveryRequestEndsOnceWithItsTokensWhoeverComesAndGoes) {
  spdlog::set_level(spdlog::level::off);
  const uint64_t first_seed = 1;
  const int32_t num_cells = 240;
  Totals sum;
  for (uint64_t seed = first_seed; seed < first_seed + num_cells; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    CellConfig config = RandomConfig(seed);
    config.error_rate = 0;
    config.poison_rate = seed % 3 == 0 ? 0.02 : 0;
    config.max_workers = static_cast<int32_t>(1 + seed % 5);
    EpochCell(config, seed).Run(1000, &sum);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  std::printf(
      "seeds %lu-%lu: %lu steps, %lu lost in flight, %lu epochs, %lu "
      "pauses, %lu sequences moved, "
      "%lu choices finished, %lu failed, %lu times unavailable, %lu "
      "cancels, %lu dropped results\n",
      first_seed, first_seed + num_cells - 1, sum.steps, sum.lost, sum.epochs, sum.pauses,
      sum.moved, sum.finished, sum.failed, sum.unavailable, sum.cancelled, sum.dropped);
  EXPECT_GE(sum.steps, 100000u);
  // The cells have seen everything that the test is about.
  EXPECT_GT(sum.finished, 1000u);
  EXPECT_GT(sum.failed, 10u);
  EXPECT_GT(sum.lost, 500u);
  EXPECT_GT(sum.pauses, 500u);
  EXPECT_GT(sum.moved, 500u);
  EXPECT_GT(sum.unavailable, 5u);
  EXPECT_GT(sum.cancelled, 100u);
}

}  // namespace
}  // namespace switchyard
