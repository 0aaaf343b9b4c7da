// The server of one process, from its flags to its orderly end: what `serve` and `trace` run. On
// the main thread, once per process.
#pragma once

#include <functional>

#include "server/cli/front_end_flags.h"
#include "server/cli/local_engine.h"

namespace switchyard {

// Listens, loads, prints the ready line on stdout, serves until SIGTERM or SIGINT, lets running
// requests finish. Then `at_end`, whose exit code is returned; an error before that is printed.
int ServeInProcess(LocalEngineFlags engine, const FrontEndFlags& front_end,
                   const std::function<int(LocalEngine&)>& at_end);

}  // namespace switchyard
