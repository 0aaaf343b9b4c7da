// The subcommands of `switchyard`: a file each, which turns flags into the options of the function
// that does the work and binds the rooms together. This folder and main.cc are the composition
// root, the only place that may include every room. Used on the main thread only.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace switchyard {

class RoleHost;

// A subcommand of the command line. `run` owns the flags and is called after they were parsed;
// it returns the exit code.
struct Command {
  const CLI::App* app = nullptr;
  std::function<int()> run;
};

// Exit codes: 0 done, 1 failed, 2 wrong usage.
constexpr int kFailed = 1;
constexpr int kUsage = 2;
// Prints the message on stderr; returns the exit code for it.
int Fail(const absl::Status& status);

Command AddServe(CLI::App* app);
Command AddServer(CLI::App* app);
Command AddGenerate(CLI::App* app);
Command AddEval(CLI::App* app);
Command AddInspect(CLI::App* app);
Command AddSynth(CLI::App* app);
Command AddBench(CLI::App* app);
// `wrap_host`: WorkerProcessOptions::wrap_host.
Command AddWorker(
    CLI::App* app,
    std::function<std::unique_ptr<RoleHost>(std::unique_ptr<RoleHost>)> wrap_host = nullptr);
Command AddTrace(CLI::App* app);

}  // namespace switchyard
