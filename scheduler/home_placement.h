// HomePlacement: which expert worker holds which experts, by worker id, before ranks exist.
// Planning is a pure function: experts stay where they are, those without a home go to the emptiest
// worker, and workers that came late relieve the fullest, so that a change moves as few weights as
// it can.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <vector>

namespace switchyard {

using WorkerId = uint64_t;  // of one incarnation of one worker; never reused

// [num_moe_layers] experts that one worker holds.
using ExpertSets = std::vector<std::set<int32_t>>;
using HomePlacement = std::map<WorkerId, ExpertSets>;

struct HomeSlots {
  WorkerId worker = 0;
  int32_t slots = 0;  // experts per layer that it can hold
};

// Every expert gets a home among `workers` and no worker holds more than its slots; nothing when
// they have too few slots for that. Homes and replicas of `current` on `workers` are kept, except
// where a worker with at least two fewer experts in the layer takes one over; what other workers
// hold is lost. A replica makes room for an expert without a home.
std::optional<HomePlacement> PlanHomes(const HomePlacement& current,
                                       const std::vector<HomeSlots>& workers, int32_t num_layers,
                                       int32_t num_experts);

}  // namespace switchyard
