// The planner's cost constants (comm/plan_costs.h) measured on this machine: what reading one
// expert, computing one row and moving one expert take, with the model's shapes. Takes a few tens
// of milliseconds; the scheduler publishes one worker's answer to all ranks.
#pragma once

#include <cstdint>

#include "comm/plan_costs.h"
#include "kernels/backend.h"

namespace switchyard {

struct PlanCostProbe {
  int64_t hidden = 0;
  int64_t width = 0;  // of an expert
  DType dtype = DType::kF32;
};

// Moving is measured as a copy in memory: ranks of one process. The result passes CheckPlanCosts.
PlanCosts MeasurePlanCosts(const PlanCostProbe& probe, ComputeBackend* backend);

}  // namespace switchyard
