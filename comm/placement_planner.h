// The slow loop's decision: which expert ranks hold which experts, from what was activated lately.
// Pure functions, any thread; called by the scheduler. Bounded work: tens of milliseconds for the
// largest models.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/expert_placement.h"

namespace switchyard {

struct PlacementRequest {
  int32_t num_layers = 0;
  int32_t num_experts = 0;
  int32_t num_ranks = 0;
  int32_t home_slots_per_rank = 0;      // per layer
  std::span<const int64_t> loads = {};  // [num_layers, num_experts] activations; all 0: unknown
  int32_t hysteresis_percent = 10;  // a layer stays unless its fullest rank gains more than this
  const ExpertPlacement* current = nullptr;   // null: nothing is loaded anywhere
  std::span<const int32_t> new_rank_of = {};  // [current's ranks] -1: gone; empty: as they are
};

// Every expert has a home, none has two on one rank, no rank has more than home_slots_per_rank
// experts of a layer. All slots are used as far as ranks allow: the hottest experts get a second
// replica before any gets a third, then whoever has the most load per replica. Experts stay where
// they are as far as balance allows. Deterministic. kInvalidArgument: sizes that disagree, or fewer
// slots than experts.
absl::StatusOr<ExpertPlacement> PlanPlacement(const PlacementRequest& request);

// An expert that a rank must load to go from one placement to the next.
struct ExpertLoad {
  int32_t layer = 0;
  int32_t expert = 0;
  int32_t rank = 0;  // of `to`
  friend bool operator==(const ExpertLoad&, const ExpertLoad&) = default;
};
std::vector<ExpertLoad> ExpertLoads(const ExpertPlacement* from,
                                    std::span<const int32_t> new_rank_of,
                                    const ExpertPlacement& to);

// Load of the fullest rank of a layer over the mean, when every expert's load is split evenly over
// its homes; 1 without load. For reports.
double PlacementImbalance(const ExpertPlacement& placement, int32_t layer,
                          std::span<const int64_t> loads);

}  // namespace switchyard
