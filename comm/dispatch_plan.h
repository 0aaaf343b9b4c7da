// DispatchPlan: who computes which (token, expert) copies of one layer. The planner is a pure
// function of the counts, the placement and nothing local, so every rank derives the identical plan
// (BALANCE.md section 2). Integers only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "comm/expert_placement.h"

namespace switchyard {

// `copies` copies that source s has for expert e go to expert rank `rank`. For one (source, expert)
// the shares are in ascending rank order and are taken from the source's copies in batch order.
struct DispatchShare {
  int32_t rank = 0;
  int32_t copies = 0;
  friend bool operator==(const DispatchShare&, const DispatchShare&) = default;
};

struct DispatchPlan {
  int32_t num_sources = 0;
  int32_t num_experts = 0;
  int32_t num_ranks = 0;
  std::vector<int32_t> offsets;       // [num_sources * num_experts + 1] into shares
  std::vector<DispatchShare> shares;  // by source, then expert, then rank
  int64_t max_rank_copies = 0;        // load of the most loaded rank, in copies
  int64_t lower_bound = 0;            // no plan over these replicas can have a smaller maximum
  uint64_t hash = 0;                  // over the whole plan; stands in data headers

  // The shares of source s for expert e, ascending by rank; none when it has no copies for it.
  std::span<const DispatchShare> Of(int32_t source, int32_t expert) const {
    const size_t i = static_cast<size_t>(source) * static_cast<size_t>(num_experts) +
                     static_cast<size_t>(expert);
    return std::span(shares).subspan(static_cast<size_t>(offsets[i]),
                                     static_cast<size_t>(offsets[i + 1] - offsets[i]));
  }
};

// counts: [num_sources, num_experts] copies per participant (in the order of the step header) and
// expert, >= 0.
DispatchPlan PlanDispatch(std::span<const int32_t> counts, int32_t num_sources,
                          const ExpertPlacement& placement, int32_t layer);

}  // namespace switchyard
