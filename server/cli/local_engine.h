// LocalEngine: text parts, scheduler and workers of one process, for `serve` and `generate`. Owned
// by the subcommand's function, made and destroyed on its thread.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "scheduler/cluster_snapshot.h"
#include "scheduler/scheduler.h"
#include "scheduler/worker_client.h"
#include "server/cli/model_text.h"
#include "server/engine.h"
#include "worker/local_cell.h"

namespace CLI {
class App;
}

namespace switchyard {

struct LocalEngineFlags {
  CellOptions cell;
  SchedulerOptions scheduler;
  std::string device = "auto";
};

void AddLocalEngineFlags(CLI::App* app, LocalEngineFlags* flags);

// How expert workers share the work: --balance, --expert-foreign-slots.
void AddBalanceFlags(CLI::App* app, PlannerOptions* planner);

// In which format weights are kept: --quantization, --quantization-overrides.
void AddWeightFormatFlags(CLI::App* app, WeightFormatOptions* formats);

// How a worker computes: threads, device, instruction path, dtype.
void AddComputeFlags(CLI::App* app, CellOptions* cell, std::string* device);

// Destroyed in reverse: the scheduler first, then the workers.
struct LocalEngine {
  ModelText text;
  std::unique_ptr<LocalCell> cell;
  std::unique_ptr<WorkerClient> client;
  std::unique_ptr<Scheduler> scheduler;  // not started
  Engine engine;

  ClusterSnapshot Snapshot() const;  // the workers; any thread
};

struct LocalEngineNames {
  std::string served_model_name;  // "": the folder's name
  std::string chat_template;      // "": the checkpoint's own
};

// Loads text parts and weights; `percent` is called with 0 … 100 while the weights load.
absl::StatusOr<std::unique_ptr<LocalEngine>> LoadLocalEngine(
    LocalEngineFlags flags, const LocalEngineNames& names, const std::function<void(int)>& percent);

}  // namespace switchyard
