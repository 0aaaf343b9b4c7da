// DispatchPlan: who computes which (token, expert) copies of one layer, and which expert weights
// move for it. Made by DispatchPlanner; every rank of a step makes the identical plan. Integers
// only. Its owner reuses it from layer to layer, so nothing grows after the largest plan.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace switchyard {

// `copies` copies that source s has for expert e go to expert rank `rank`. For one (source, expert)
// the shares are in ascending rank order and are taken from the source's copies in batch order.
struct DispatchShare {
  int32_t rank = 0;
  int32_t copies = 0;
  friend bool operator==(const DispatchShare&, const DispatchShare&) = default;
};

// Before this layer is computed expert rank `from_rank`, a home of the expert, sends its weights to
// `to_rank`, which keeps them in foreign slot `slot` of the layer. What was in the slot is not read
// by this plan.
struct WeightMove {
  int32_t expert = 0;
  int32_t from_rank = 0;
  int32_t to_rank = 0;
  int32_t slot = 0;
  friend bool operator==(const WeightMove&, const WeightMove&) = default;
};

// What the plan was made by (BALANCE.md section 1).
enum class PlanRegime : uint8_t {
  kPlain,      // every copy at the expert's first home
  kActivated,  // A: whole experts, fewest distinct ones per rank
  kReplicas,   // B: tokens split over the replicas
  kSpill,      // C: weights moved
  kEven,       // tokens split evenly over the homes
};
const char* PlanRegimeName(PlanRegime regime);

struct DispatchPlan {
  int32_t num_sources = 0;
  int32_t num_experts = 0;
  int32_t num_ranks = 0;
  std::vector<int32_t> offsets;       // [num_sources * num_experts + 1] into shares
  std::vector<DispatchShare> shares;  // by source, then expert, then rank
  std::vector<WeightMove> moves;      // by to_rank, then expert

  PlanRegime regime = PlanRegime::kPlain;
  int64_t tau_ps = 0;          // modelled cost of the most loaded rank, transfers included
  int64_t lower_bound_ps = 0;  // no plan that the options allow can have a smaller tau
  int64_t plain_tau_ps = 0;    // of plain expert parallelism on the same counts
  int64_t total_copies = 0;
  int64_t max_rank_copies = 0;  // load of the most loaded rank
  int64_t plain_max_rank_copies = 0;
  int64_t spilled_copies = 0;  // computed from a foreign slot
  uint64_t hash = 0;           // over the whole plan; stands in data headers

  // The shares of source s for expert e, ascending by rank; none when it has no copies for it.
  std::span<const DispatchShare> Of(int32_t source, int32_t expert) const {
    const size_t i = static_cast<size_t>(source) * static_cast<size_t>(num_experts) +
                     static_cast<size_t>(expert);
    return std::span(shares).subspan(static_cast<size_t>(offsets[i]),
                                     static_cast<size_t>(offsets[i + 1] - offsets[i]));
  }
  // tau over its lower bound, minus 1; for reports.
  double Gap() const {
    return lower_bound_ps == 0
               ? 0.0
               : static_cast<double>(tau_ps) / static_cast<double>(lower_bound_ps) - 1.0;
  }
};

}  // namespace switchyard
