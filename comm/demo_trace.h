// The demo model's routing on its eval set, recorded by `switchyard trace` and part of the binary
// (models/demo/README.md has the command): so the default benchmark of planners has real text.
#pragma once

#include "comm/routing_trace.h"

namespace switchyard {

RoutingTrace ReadDemoTrace();

}  // namespace switchyard
