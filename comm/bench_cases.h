// What bench planner runs: synthetic workloads (workload.h) and recorded ones
// (recorded_workload.h), the demo model's among them. Plain values and functions; the caller's
// thread.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/recorded_workload.h"
#include "comm/routing_trace.h"
#include "comm/workload.h"

namespace switchyard {

// How recorded routing is replayed.
struct ReplayOptions {
  int32_t num_ranks = 4;
  int32_t num_sources = 2;
  int32_t decode_tokens = 64;    // per step
  int32_t prefill_tokens = 512;  // per step
};

struct BenchCase {
  WorkloadSpec spec;          // of a recorded workload: its sizes alone
  int32_t replica_slots = 0;  // home slots per rank beyond N / P
  double skew = -1;           // of the plotted workloads, which differ in it alone
  std::string name = "";      // of a recorded workload
  std::optional<RecordedWorkload::Spec> recorded = std::nullopt;

  std::string Name() const { return recorded ? name : spec.Name(); }
};

std::vector<BenchCase> SyntheticCases(uint64_t seed);

// A trace and the name that it has in workloads: without anything that needs escaping.
struct NamedTrace {
  std::string name;
  RoutingTrace trace;
};
// The demo model's trace, then those of the files, named after them, each name once. Errors: those
// of the files; one without rows.
absl::StatusOr<std::vector<NamedTrace>> ReadTraces(const std::vector<std::string>& paths);
// LayersToReplay(trace) x decode and prefill. The cases refer to `trace`. Errors: sizes out of
// range, more ranks than experts.
absl::Status AddRecordedCases(const NamedTrace& trace, const ReplayOptions& options,
                              std::vector<BenchCase>* cases);

using Steps = std::vector<std::vector<int32_t>>;  // counts [num_sources, num_experts] of each step
// `tick` is called before every step.
Steps StepsOf(const BenchCase& c, int32_t num_steps, const std::function<void()>& tick);

}  // namespace switchyard
