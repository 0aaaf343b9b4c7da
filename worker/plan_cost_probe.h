// The planner's cost constants (comm/plan_costs.h) measured on this machine: what reading one
// expert, computing one row and moving one expert take, with the model's shapes. Takes a few tens
// of milliseconds. The scheduler makes one set of all workers' answers for each epoch.
#pragma once

#include <cstdint>

#include "comm/plan_costs.h"
#include "kernels/backend.h"
#include "worker/move_link.h"

namespace switchyard {

struct PlanCostProbe {
  int64_t hidden = 0;
  int64_t width = 0;          // of an expert
  DType dtype = DType::kF32;  // of the rows
  WeightFormat format = {};   // of an expert
};

// Moving is measured over `link`: ranks of several processes; without one as a copy in memory:
// ranks of one process. Where it cannot be measured it is 0, unknown: no plan moves weights then.
// The result passes CheckPlanCosts.
PlanCosts MeasurePlanCosts(const PlanCostProbe& probe, ComputeBackend* backend, MoveLink* link);

}  // namespace switchyard
