#include "comm/demo_trace.h"

#include <span>

#include "kernels/check.h"

// The file's bytes in the read-only data. clang-format off
asm(".section .rodata\n"
    ".global switchyard_demo_trace_begin\n"
    ".global switchyard_demo_trace_end\n"
    "switchyard_demo_trace_begin:\n"
    ".incbin \"" SWITCHYARD_DEMO_TRACE
    "\"\n"
    "switchyard_demo_trace_end:\n"
    ".previous\n");
// clang-format on
extern "C" const std::byte switchyard_demo_trace_begin[];
extern "C" const std::byte switchyard_demo_trace_end[];

namespace switchyard {

RoutingTrace ReadDemoTrace() {
  auto trace = ParseRoutingTrace({switchyard_demo_trace_begin, switchyard_demo_trace_end},
                                 "the demo model's trace");
  SY_CHECK(trace.ok());
  return *std::move(trace);
}

}  // namespace switchyard
