// The plain structs of step_plan.h to and from their control-plane messages, field by field. Pure
// functions; whoever reads a plan or a result checks its numbers (SequenceTable, SchedulerCore).
#pragma once

#include <cstdint>

#include "proto/step_plan.h"
#include "switchyard/v1/control.pb.h"

namespace switchyard {

// Of the control plane (control.proto and what its numbers mean): raised with every change that an
// older program would misread. A worker of another one is refused.
constexpr uint32_t kProtocolVersion = 2;

void ToWire(const StepHeader& from, v1::StepHeader* to);
void ToWire(const StepPlan& from, v1::StepPlan* to);
void ToWire(const StepResult& from, v1::StepResult* to);

StepPlan FromWire(const v1::StepPlan& from);
StepResult FromWire(const v1::StepResult& from);

}  // namespace switchyard
