// ClusterEngine: front end and scheduler over workers of other processes, for `server` and `serve
// --processes`. Used on the subcommand's thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "comm/dispatch_planner.h"
#include "scheduler/cluster.h"
#include "scheduler/scheduler.h"
#include "server/cli/front_end_flags.h"
#include "worker/model_facts.h"

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace switchyard {

struct ClusterFlags {
  ModelFactsOptions model;
  ClusterOptions cluster;
  SchedulerOptions scheduler;
  PlannerOptions planner;
  FrontEndFlags front_end;
  std::string token_file;
  int no_home_timeout_s = 60;
  int placement_interval_s = 30;
  int stall_timeout_s = 60;
};

// --load-budget: what an expert worker may load beside its steps.
CLI::Option* AddLoadBudgetFlag(CLI::App* app, ClusterOptions* cluster);

// The first line of a file, without its end.
absl::StatusOr<std::string> ReadToken(const std::string& path);

// Serves until SIGTERM; returns the exit code. `on_listening` is called once workers may register;
// what it returns is destroyed last.
int RunCluster(const ClusterFlags& flags,
               const std::function<std::shared_ptr<void>(uint16_t control_port)>& on_listening);

}  // namespace switchyard
