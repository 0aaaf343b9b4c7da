// What the Membership decides, as the messages that workers get. Pure.
#pragma once

#include <cstdint>

#include "scheduler/membership.h"
#include "switchyard/v1/control.pb.h"

namespace switchyard {

// load_bytes_per_step: what it may load per step that it serves, when nobody waits for it.
v1::SchedulerMessage AssignMessage(const AssignAction& action, int64_t load_bytes_per_step);
v1::SchedulerMessage InstallMessage(const InstallAction& action, const std::string& balance,
                                    const v1::PlanCosts& costs);

}  // namespace switchyard
