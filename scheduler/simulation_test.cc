// Many random cells of workers that stay: every request must end exactly once
// with the tokens that its prompt alone determines, whatever is cancelled,
// preempted, cached or aborted meanwhile.
#include "scheduler/simulation.h"

#include <gtest/gtest.h>

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

 private:
  bool MayFail(const SamplingParams&) const override { return config_.error_rate > 0; }

  int32_t RunStep() override {
    now_ += std::chrono::milliseconds(Between(0, 30));
    MaybeCancel();
    core_.Admit();
    core_.CheckIntegrity();
    auto step = core_.Plan(now_);
    core_.CheckIntegrity();
    if (!step) {
      EXPECT_TRUE(core_.idle());
      return 1;
    }
    ++steps_;
    EXPECT_FALSE(core_.Plan(now_).has_value());  // one at a time
    CheckPlans(*step);
    MaybeCancel();
    std::shuffle(step->plans.begin(), step->plans.end(), random_);
    for (size_t i = 0; i < step->plans.size(); ++i) {
      auto& [worker, plan] = step->plans[i];
      StepResult result = RunWorker(worker, plan);
      now_ += std::chrono::milliseconds(Between(0, 5));
      if (Chance(0.02)) ApplyStale(result);
      if (Chance(0.2)) std::shuffle(result.results.begin(), result.results.end(), random_);
      const bool complete = core_.Apply(result, now_).has_value();
      EXPECT_EQ(complete, i + 1 == step->plans.size());
      core_.CheckIntegrity();
      if (Chance(0.02)) core_.Apply(result, now_);  // a duplicate
      if (!complete) MaybeCancel();
    }
    EXPECT_FALSE(core_.step_in_flight());
    Receive();
    TakeLeftQueue();
    return 1;
  }

  StepResult RunWorker(int32_t worker, const StepPlan& plan) {
    StepResult result;
    const bool error = Chance(config_.error_rate);
    if (!error || Chance(0.5))
      result = workers_[worker].Run(plan);  // else it fails before it learns of the plan
    if (error) {
      result = {plan.header.epoch, plan.header.step, worker, "injected", false, {}};
      // Or an answer that is no answer.
      if (Chance(0.3)) result.error.clear();
    }
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
};

TEST(SimulationTest, EveryRequestEndsOnceWithItsTokens) {
  spdlog::set_level(spdlog::level::off);  // errors are what it injects
  const uint64_t first_seed = 1;
  const int32_t num_cells = 150;
  Totals sum;
  for (uint64_t seed = first_seed; seed < first_seed + num_cells; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    FixedCell(RandomConfig(seed), seed).Run(1000, &sum);
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
}

}  // namespace
}  // namespace switchyard
