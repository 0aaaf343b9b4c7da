#include "scheduler/cell_costs.h"

#include <algorithm>
#include <cstdint>

#include "comm/plan_costs.h"

namespace switchyard {

v1::PlanCosts CombineCosts(const std::vector<v1::PlanCosts>& measured) {
  v1::PlanCosts costs;
  if (measured.empty()) return costs;
  const auto sorted = [&](auto get, int64_t max) {
    std::vector<int64_t> values;
    for (const v1::PlanCosts& of : measured) {
      values.push_back(std::clamp<int64_t>((of.*get)(), 0, max));
    }
    std::ranges::sort(values);
    return values;
  };
  const size_t middle = (measured.size() - 1) / 2;
  costs.set_token_ps(sorted(&v1::PlanCosts::token_ps, kMaxTokenPs)[middle]);
  costs.set_expert_read_ps(sorted(&v1::PlanCosts::expert_read_ps, kMaxPlanCostPs)[middle]);
  const std::vector<int64_t> moves = sorted(&v1::PlanCosts::expert_move_ps, kMaxPlanCostPs);
  costs.set_expert_move_ps(moves.front() == 0 ? 0 : moves.back());
  return costs;
}

}  // namespace switchyard
