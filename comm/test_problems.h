// Random placements and counts for the tests of comm/. Linked by tests only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "comm/dispatch_planner.h"
#include "comm/expert_placement.h"
#include "kernels/check.h"
#include "kernels/test_seed.h"

namespace switchyard {

inline std::mt19937 SeededRng() { return std::mt19937(TestSeed()); }

inline int32_t Below(std::mt19937& rng, int32_t n) {
  return static_cast<int32_t>(rng() % static_cast<uint32_t>(n));
}

// Every expert on 1 … num_ranks random ranks, few replicas more often than many.
inline ExpertPlacement RandomPlacement(std::mt19937& rng, int32_t num_layers, int32_t num_experts,
                                       int32_t num_ranks) {
  std::vector<std::vector<std::vector<int32_t>>> hosts(static_cast<size_t>(num_layers));
  std::vector<int32_t> ranks(static_cast<size_t>(num_ranks));
  for (int32_t r = 0; r < num_ranks; ++r) ranks[static_cast<size_t>(r)] = r;
  for (auto& layer : hosts) {
    layer.resize(static_cast<size_t>(num_experts));
    for (auto& expert : layer) {
      std::ranges::shuffle(ranks, rng);
      const int32_t replicas = 1 + Below(rng, 1 + Below(rng, num_ranks));
      expert.assign(ranks.begin(), ranks.begin() + replicas);
      std::ranges::sort(expert);
    }
  }
  auto placement = ExpertPlacement::Create(num_ranks, std::move(hosts));
  SY_CHECK(placement.ok());
  return *std::move(placement);
}

// [num_sources, num_experts] counts in one of several shapes: even, skewed, mostly zero, one hot
// expert, all zero, and some sources empty.
inline std::vector<int32_t> RandomCounts(std::mt19937& rng, int32_t num_sources,
                                         int32_t num_experts) {
  std::vector<int32_t> counts(static_cast<size_t>(num_sources) * static_cast<size_t>(num_experts),
                              0);
  const int32_t shape = Below(rng, 6);
  const int32_t most = 1 + Below(rng, 1 << Below(rng, 11));
  const int32_t hot = Below(rng, num_experts);
  for (int32_t s = 0; s < num_sources; ++s) {
    if (Below(rng, 4) == 0) continue;
    for (int32_t e = 0; e < num_experts; ++e) {
      int32_t& count = counts[static_cast<size_t>(s) * static_cast<size_t>(num_experts) +
                              static_cast<size_t>(e)];
      if (shape == 0) count = Below(rng, most + 1);
      if (shape == 1) count = Below(rng, most + 1) / (e + 1);
      if (shape == 2) count = Below(rng, 8) == 0 ? Below(rng, most + 1) : 0;
      if (shape == 3) count = e == hot ? most : 0;
      if (shape == 4) count = e == hot ? most * 8 : Below(rng, most + 1);
    }
  }
  return counts;
}

// The plan of a planner that has made no other.
inline DispatchPlan PlanOnce(std::span<const int32_t> counts, int32_t num_sources,
                             const ExpertPlacement& placement, int32_t layer,
                             const PlannerOptions& options = {}) {
  DispatchPlanner planner(std::make_shared<const ExpertPlacement>(placement), options);
  DispatchPlan plan;
  planner.Plan(counts, num_sources, layer, &plan);
  return plan;
}

}  // namespace switchyard
