// Bench planner: synthetic workloads (workload.h) and recorded ones (recorded_workload.h; the demo
// model's always, and the traces that are given) through every balance mode; what the plans would
// cost by the cost model, how long planning takes, and a plot. `auto`, `none` and `llep` see the
// same homes: even, and in some workloads replicas of the hottest experts on higher ranks, so that
// the first home is plain expert parallelism's. `eplb` has homes of its own, planned anew every
// 8 steps from the steps before and paid for in the next one; its extra home slots equal the
// others' replica and foreign slots. Runs on the caller's thread.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/bench_cases.h"
#include "comm/dispatch_planner.h"

namespace switchyard {

struct BenchPlannerOptions {
  int32_t steps = 48;            // of every workload
  int32_t t_mem_tokens = 125;    // tokens that take as long as reading an expert: an H200 in bf16
  int32_t t_link_tokens = 1500;  // and as moving one: NVLink
  int64_t token_ps = 110'000;
  int32_t foreign_slots = 4;  // per layer and rank, of auto and llep
  uint64_t seed = 1;
  std::vector<std::string> traces;  // files; each makes a workload per replayed layer and order
  ReplayOptions replay;
  std::function<void(int64_t done, int64_t total)> progress;  // may be null
};

struct BenchPlannerRow {
  std::string workload;
  BalanceMode planner = BalanceMode::kAuto;
  double tau_us = 0;      // mean over steps, transfers included
  double bound_us = 0;    // mean lower bound
  double gap = 0;         // tau / bound - 1
  double max_mean = 0;    // mean over steps of the fullest rank's copies over the mean
  double floor = 0;       // max/mean of a perfectly uniform router at this size, by sampling alone
  int64_t transfers = 0;  // experts moved; for eplb those that a rank loads anew
  double move_us = 0;     // what one costs
  double plan_p50_us = 0, plan_p99_us = 0;
  std::string regime;          // the most frequent one
  int32_t recover_steps = -1;  // after a shift, until tau is within 5 % of before; -1: no shift
  double skew = -1;            // of the plotted workloads, else -1
};

struct BenchPlannerReport {
  BenchPlannerOptions options;
  std::vector<BenchPlannerRow> rows;
  std::string Text() const;
  std::string Json() const;  // one object with a list `rows`
  std::string Svg() const;   // max/mean and cost against skew, a line per planner
};

// Errors: options out of range, a trace that cannot be read or has no rows.
absl::StatusOr<BenchPlannerReport> BenchPlanner(const BenchPlannerOptions& options);

}  // namespace switchyard
