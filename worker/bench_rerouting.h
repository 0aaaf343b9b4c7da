// Bench rerouting: what moving work from the most to the least loaded expert rank gains in the
// expert layers, against plain expert parallelism in the same run, interleaved. Synthetic skewed
// routing (comm/workload.h) goes through both planners; every rank's share is really computed, by
// one thread and one rank after the other, and every expert that a plan moves is really sent over
// the host network. A layer's parallel time is put together from the processor time of that:
// planning + the longest sum of one rank's computing and moves. So it shows what ranks with a core
// each would take, also on a machine that has fewer cores, or busy ones; what it leaves out is
// dispatch and combine. Beside it stands the cost model's figure. Runs on the caller's thread.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/plan_costs.h"

namespace switchyard {

struct BenchReroutingOptions {
  int64_t hidden = 512;
  int64_t width = 256;  // of an expert
  int32_t layers = 8;
  int32_t experts = 16;
  int32_t top_k = 4;
  int32_t ranks = 4;                        // expert workers; experts are spread evenly over them
  int32_t foreign_slots = 2;                // per layer and rank
  std::vector<int32_t> tokens = {16, 512};  // of a step
  int32_t steps = 15;                       // of each workload and planner
  std::string dtype = "bfloat16";           // or float32
  std::string isa = "auto";
  uint64_t seed = 1;
  std::function<void(int64_t done, int64_t total)> progress;  // may be null
};

struct BenchReroutingRow {
  std::string workload;  // unique
  int32_t tokens = 0;
  double plain_max_mean = 0, auto_max_mean = 0;  // copies of the fullest rank over the mean
  double plain_ms = 0, auto_ms = 0;  // expert layers of one step: medians, measured, put together
  double speedup = 0;                // median over steps of plain / auto
  double speedup_p25 = 0, speedup_p75 = 0;
  double modelled_speedup = 0;              // by the cost model, over all steps
  int64_t moves = 0;                        // experts sent, over all steps
  double move_us = 0;                       // median of one; 0: none
  bool idle = false;                        // auto made plain expert parallelism's plans throughout
  int64_t plain_bytes = 0, auto_bytes = 0;  // of the fullest rank: weights, slots, rows in and out
};

struct BenchReroutingReport {
  BenchReroutingOptions options;
  PlanCosts costs;  // as measured before
  std::vector<BenchReroutingRow> rows;
  std::string Text() const;
  std::string Json() const;
};

// kInvalidArgument: the options. Errors of the network.
absl::StatusOr<BenchReroutingReport> BenchRerouting(const BenchReroutingOptions& options);

}  // namespace switchyard
