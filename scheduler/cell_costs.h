// The planner's cost constants of one epoch, from what its expert workers measured. Pure.
#pragma once

#include <vector>

#include "switchyard/v1/control.pb.h"

namespace switchyard {

// Computing and reading: the (lower) median of the workers, for one slow worker shall not change
// every plan. Moving: the largest, for a plan does not know between whom it will move; 0, so that
// nothing moves, when some worker could not measure it. Values out of range are brought into it
// (comm/plan_costs.h). measured: at least one.
v1::PlanCosts CombineCosts(const std::vector<v1::PlanCosts>& measured);

}  // namespace switchyard
