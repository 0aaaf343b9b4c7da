// Many random cells of workers that stay: every request must end exactly once
// with the tokens that its prompt alone determines, whatever is cancelled,
// preempted, cached or aborted meanwhile.
#include "scheduler/simulation.h"

#include <gtest/gtest.h>

#include <deque>
#include <map>

#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

class FixedCell : public Simulation {
 public:
  FixedCell(const CellConfig& config, uint64_t seed) : Simulation(config, seed) {
    core_.Install(FirstEpoch(config.model, config.max_workers));
    for (int32_t rank = 0; rank < config.max_workers; ++rank)
      workers_.emplace_back(config.model, rank);
  }

  int32_t most_in_flight() const { return most_in_flight_; }

 private:
  bool MayFail(const SamplingParams&) const override { return config_.error_rate > 0; }

  // Until a step is complete, with as many in flight as the core plans.
  int32_t RunStep() override {
    now_ += std::chrono::milliseconds(Between(0, 30));
    MaybeCancel();
    PlanSteps();
    if (plans_.empty()) {
      EXPECT_TRUE(core_.idle());
      EXPECT_FALSE(core_.step_in_flight());
      return 1;
    }
    while (!Answer() && !testing::Test::HasFailure()) {
      MaybeCancel();
      if (Chance(0.5)) PlanSteps();
    }
    Receive();
    TakeLeftQueue();
    return 1;
  }

  void PlanSteps() {
    while (core_.CanPlan() && (!core_.step_in_flight() || Chance(0.9))) {
      auto step = AdmitAndPlan();
      if (!step) break;
      for (auto& entry : step->plans) plans_.push_back(std::move(entry));
      most_in_flight_ = std::max(most_in_flight_, ++in_flight_);
    }
    EXPECT_LE(in_flight_, config_.options.max_steps_in_flight);
    if (core_.CanPlan()) return;
    EXPECT_FALSE(core_.Plan(now_).has_value());
  }

  // Some worker answers the oldest plan that it has. True when that completed a step.
  bool Answer() {
    std::vector<int32_t> workers;
    for (const auto& [worker, plan] : plans_) workers.push_back(worker);
    const int32_t worker = workers[Between(0, static_cast<int32_t>(workers.size()) - 1)];
    const auto oldest = std::ranges::find(plans_, worker, &std::pair<int32_t, StepPlan>::first);
    const StepPlan plan = std::move(oldest->second);
    plans_.erase(oldest);
    StepResult result = RunWorker(worker, plan);
    now_ += std::chrono::milliseconds(Between(0, 5));
    if (Chance(0.02)) ApplyStale(result);
    if (Chance(0.2)) std::shuffle(result.results.begin(), result.results.end(), random_);
    const bool complete = core_.Apply(result, now_).has_value();
    EXPECT_EQ(complete, std::ranges::none_of(plans_, [&](const auto& entry) {
                return entry.second.header.step == plan.header.step;
              }));
    in_flight_ -= complete;
    core_.CheckIntegrity();
    if (Chance(0.02)) core_.Apply(result, now_);  // a duplicate
    return complete;
  }

  StepResult RunWorker(int32_t worker, const StepPlan& plan) {
    StepResult result;
    // One that has failed fails in what it was sent before that was known, too.
    const bool again = failed_until_.contains(worker) && plan.header.step <= failed_until_[worker];
    const bool error = again || Chance(config_.error_rate);
    if (!error || (!again && Chance(0.5)))
      result = workers_[worker].Run(plan);  // else it fails before it learns of the plan
    const bool failed = error || !result.error.empty();
    if (error) {
      result = {plan.header.epoch, plan.header.step, worker, "injected", false, {}};
      // Or an answer that is no answer.
      if (Chance(0.3)) result.error.clear();
    }
    if (failed) failed_until_[worker] = steps_;
    totals_.errors += !result.error.empty();
    return result;
  }

  void ApplyStale(StepResult result) {
    if (Chance(0.5)) {
      --result.step;
    } else {
      ++result.epoch;
    }
    const uint64_t before = core_.Stats().dropped_results;
    EXPECT_FALSE(core_.Apply(result, now_).has_value());
    EXPECT_EQ(core_.Stats().dropped_results, before + 1);
  }

  std::vector<FakeWorker> workers_;
  std::deque<std::pair<int32_t, StepPlan>> plans_;  // not answered, by step
  std::map<int32_t, uint64_t> failed_until_;        // by rank
  int32_t in_flight_ = 0;
  int32_t most_in_flight_ = 0;
};

TEST(SimulationTest, EveryRequestEndsOnceWithItsTokens) {
  spdlog::set_level(spdlog::level::off);  // errors are what it injects
  const uint64_t first_seed = 1;
  const int32_t num_cells = 150;
  Totals sum;
  int32_t most_in_flight = 0;
  for (uint64_t seed = first_seed; seed < first_seed + num_cells; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    FixedCell cell(RandomConfig(seed), seed);
    cell.Run(1000, &sum);
    most_in_flight = std::max(most_in_flight, cell.most_in_flight());
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  std::printf(
      "seeds %lu-%lu: %lu steps, %lu choices finished, %lu failed, %lu "
      "cancels, %lu preemptions, "
      "%lu cached prompt tokens, %lu errors, %lu dropped results, "
      "longest life %lu steps\n",
      first_seed, first_seed + num_cells - 1, sum.steps, sum.finished, sum.failed, sum.cancelled,
      sum.preemptions, sum.cached, sum.errors, sum.dropped, sum.max_age);
  EXPECT_GE(sum.steps, 100000u);
  // The cells have seen everything that the test is about.
  EXPECT_GT(sum.finished, 1000u);
  EXPECT_GT(sum.failed, 10u);
  EXPECT_GT(sum.cancelled, 100u);
  EXPECT_GT(sum.preemptions, 100u);
  EXPECT_GT(sum.cached, 1000u);
  EXPECT_GT(sum.errors, 100u);
  EXPECT_EQ(most_in_flight, 2);
}

}  // namespace
}  // namespace switchyard
