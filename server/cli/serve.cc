#include <CLI/CLI.hpp>
#include <memory>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "server/cli/child_workers.h"
#include "server/cli/cluster_engine.h"
#include "server/cli/command.h"
#include "server/cli/front_end_flags.h"
#include "server/cli/local_engine.h"
#include "server/cli/local_server.h"

namespace switchyard {
namespace {

struct ServeFlags {
  LocalEngineFlags engine;
  FrontEndFlags front_end;
  bool processes = false;
  ClusterOptions cluster;  // of the processes
};

// The same cell as processes of their own: what `switchyard server` and `switchyard worker` make.
int RunProcesses(const ServeFlags& flags) {
  const CellOptions& cell = flags.engine.cell;
  ClusterFlags cluster;
  cluster.model = {.model_dir = cell.model_dir,
                   .dtype = cell.dtype,
                   .isa = cell.isa,
                   .max_model_len = cell.max_model_len,
                   .formats = cell.formats};
  cluster.scheduler = flags.engine.scheduler;
  cluster.front_end = flags.front_end;
  cluster.cluster = flags.cluster;
  cluster.cluster.control_port = 0;
  cluster.cluster.min_expert_workers = cell.expert_workers;
  cluster.planner = cell.planner;
  std::random_device random;
  for (int i = 0; i < 8; ++i) absl::StrAppend(&cluster.cluster.token, absl::Hex(random()));
  const int cores =
      cell.threads > 0 ? cell.threads : static_cast<int>(std::thread::hardware_concurrency());
  ChildWorkersOptions children{.attention_workers = cell.attention_workers,
                               .expert_workers = cell.expert_workers,
                               .threads = cores,
                               .arguments = {},
                               .token = cluster.cluster.token};
  const auto add = [&](const char* flag, const auto& value) {
    children.arguments.push_back(flag);
    children.arguments.push_back(absl::StrCat(value));
  };
  add("--model", cell.model_dir);
  add("--dtype", cell.dtype);
  add("--isa", cell.isa);
  add("--quantization", cell.formats.quantization);
  if (!cell.formats.overrides_file.empty())
    add("--quantization-overrides", cell.formats.overrides_file);
  add("--max-model-len", cell.max_model_len);
  add("--kv-cache-memory", cell.kv_cache_memory / cell.attention_workers);
  add("--log-format", flags.front_end.log_format);
  return RunCluster(cluster, [&](uint16_t control_port) {
    add("--scheduler", absl::StrCat("127.0.0.1:", control_port));
    return std::make_shared<ChildWorkers>(children);
  });
}

int RunServe(const ServeFlags& flags) {
  if (flags.processes) return RunProcesses(flags);
  return ServeInProcess(flags.engine, flags.front_end, [](LocalEngine&) { return 0; });
}

}  // namespace

Command AddServe(CLI::App* parent) {
  CLI::App* app = parent->add_subcommand("serve", "serve a model over HTTP and gRPC");
  app->footer(
      "Serves the OpenAI API over HTTP (/v1/chat/completions, /v1/completions, /v1/models, "
      "/tokenize,\n/detokenize, /health, /metrics) and switchyard.v1.Inference over gRPC. When it "
      "can answer it\nprints one line on stdout: switchyard ready http=HOST:PORT grpc=HOST:PORT "
      "model=NAME.\n\nExample: switchyard serve --model models/demo --port 8000 --expert-workers "
      "4");
  auto flags = std::make_shared<ServeFlags>();
  AddLocalEngineFlags(app, &flags->engine);
  AddFrontEndFlags(app, &flags->front_end);
  CLI::Option* processes = app->add_flag(
      "--processes", flags->processes,
      "workers are child processes, started again when they die, as `switchyard worker` "
      "on other machines would be; the workers of each pool get twice their share of --threads");
  AddLoadBudgetFlag(app, &flags->cluster)->needs(processes);
  return {app, [flags] { return RunServe(*flags); }};
}

}  // namespace switchyard
