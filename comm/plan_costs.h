// PlanCosts: the cost model of BALANCE.md section 1 as integers. Measured by workers, published in
// the epoch, so that every rank plans with the same numbers. Values.
#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"

namespace switchyard {

// Picoseconds throughout: a rank computes `tokens` copies of one expert in
// max(expert_read_ps, tokens * token_ps). t_mem = expert_read_ps / token_ps tokens,
// t_link = expert_move_ps / token_ps tokens.
struct PlanCosts {
  int64_t token_ps = 10'000;  // computing one copy, weights at hand; at least 1
  // Reading one expert's weights from memory. Default: t_mem of 100 tokens, a CPU's.
  int64_t expert_read_ps = 1'000'000;
  // Moving one expert between two ranks, message overhead included; counted at both ends, as if
  // nothing were overlapped. 0: unknown, so no plan that weighs costs moves weights.
  int64_t expert_move_ps = 0;
  // An exact plan of regime B must gain at least this much over the greedy one to be tried.
  int64_t exact_plan_ps = 50'000'000;

  int64_t Compute(int64_t tokens) const {
    return tokens == 0 ? 0 : std::max(expert_read_ps, tokens * token_ps);
  }
  friend bool operator==(const PlanCosts&, const PlanCosts&) = default;
};

// A copy's largest cost: 10 ms. With kMaxStepCopies copies, twice their time fits in an int64.
constexpr int64_t kMaxTokenPs = 10'000'000'000;
constexpr int64_t kMaxPlanCostPs = 10'000'000'000'000;  // of the other costs
constexpr int64_t kMaxStepCopies = int64_t{1} << 28;    // (token, expert) pairs of one layer

// In the ranges that cannot overflow: token_ps from 1 to kMaxTokenPs, the others from 0 to
// kMaxPlanCostPs.
absl::Status CheckPlanCosts(const PlanCosts& costs);

}  // namespace switchyard
