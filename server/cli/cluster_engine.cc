#include "server/cli/cluster_engine.h"

#include <spdlog/spdlog.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/cli/command.h"
#include "server/cli/log.h"
#include "server/cli/model_text.h"
#include "server/server.h"
#include "server/shutdown_signals.h"

namespace switchyard {
namespace {

// Everything behind the engine, destroyed in reverse.
struct ClusterEngine {
  ModelText text;
  std::unique_ptr<Cluster> cluster;
  std::unique_ptr<Scheduler> scheduler;
  Engine engine;
};

absl::StatusOr<std::unique_ptr<ClusterEngine>> MakeClusterEngine(ClusterFlags flags) {
  auto made = std::make_unique<ClusterEngine>();
  auto text = LoadModelText(flags.model.model_dir, flags.front_end.chat_template);
  if (!text.ok()) return text.status();
  made->text = *std::move(text);
  auto facts = ReadModelFacts(flags.model);
  if (!facts.ok()) return facts.status();
  // What every attention worker has at least: the others are refused.
  ModelInfo& model = facts->info;
  model.num_kv_blocks = (model.max_model_len + model.block_size - 1) / model.block_size;
  if (!flags.token_file.empty()) {
    auto token = ReadToken(flags.token_file);
    if (!token.ok()) return token.status();
    flags.cluster.token = *std::move(token);
  }
  flags.cluster.model = facts->info;
  flags.cluster.model_hash = facts->model_hash;
  flags.cluster.max_num_batched_tokens = flags.scheduler.max_num_batched_tokens;
  flags.cluster.balance = BalanceModeName(flags.planner.mode);
  flags.cluster.foreign_slots = flags.planner.foreign_slots_per_rank;
  flags.cluster.no_home_timeout = std::chrono::seconds(flags.no_home_timeout_s);
  flags.cluster.placement_interval = std::chrono::seconds(flags.placement_interval_s);
  flags.cluster.stall_timeout = std::chrono::seconds(flags.stall_timeout_s);
  flags.scheduler.max_queued_requests = flags.front_end.max_queued_requests;
  auto cluster = Cluster::Create(flags.cluster);
  if (!cluster.ok()) return cluster.status();
  made->cluster = *std::move(cluster);

  Engine& engine = made->engine;
  engine.model = facts->info;
  if (!flags.front_end.served_model_name.empty())
    engine.model.name = flags.front_end.served_model_name;
  made->text.Bind(&engine);
  made->scheduler = std::make_unique<Scheduler>(flags.scheduler, engine.model, made->cluster.get());
  engine.scheduler = made->scheduler.get();
  return made;
}

}  // namespace

CLI::Option* AddLoadBudgetFlag(CLI::App* app, ClusterOptions* cluster) {
  return app
      ->add_option("--load-budget", cluster->load_bytes_per_step,
                   "expert weights that a worker loads per step while it serves, e.g. 64MiB; a "
                   "load that requests wait for is not held back (0: none is)")
      ->capture_default_str()
      ->transform(CLI::AsSizeValue(false))
      ->check(CLI::NonNegativeNumber);
}

absl::StatusOr<std::string> ReadToken(const std::string& path) {
  std::ifstream file(path);
  std::string token;
  if (!std::getline(file, token) || token.empty())
    return absl::InvalidArgumentError(absl::StrCat("--cluster-token-file ", path, " has no token"));
  return std::string(absl::StripSuffix(token, "\r"));
}

int RunCluster(const ClusterFlags& flags,
               const std::function<std::shared_ptr<void>(uint16_t control_port)>& on_listening) {
  ConfigureLog(flags.front_end.log_format);
  ShutdownSignals shutdown;  // before any other thread
  const ServerOptions options = flags.front_end.server_options();
  Server server(options);
  if (absl::Status status = server.Start(); !status.ok()) return Fail(status);
  std::shared_ptr<void> workers;  // goes after the cluster: then nobody has to say goodbye
  auto made = MakeClusterEngine(flags);
  if (!made.ok()) return Fail(made.status());
  ClusterEngine& cell = **made;
  Cluster* const cluster = cell.cluster.get();
  server.SetCluster([cluster] { return cluster->Snapshot(); });
  server.SetWaitsFor([cluster] { return cluster->Snapshot().waits_for; });
  cluster->SetReadyCallback([&, engine = cell.engine] {
    server.SetEngine(engine);
    std::printf("switchyard ready http=%s:%d grpc=%s:%d control=%s:%d model=%s\n",
                options.http.host.c_str(), server.http_port(), options.http.host.c_str(),
                server.grpc_port(), flags.cluster.host.c_str(), cluster->control_port(),
                engine.model.name.c_str());
    std::fflush(stdout);
  });
  cell.scheduler->SetStepObserver(server.step_observer());
  cell.scheduler->Start();
  std::printf("switchyard listening http=%s:%d grpc=%s:%d control=%s:%d\n",
              options.http.host.c_str(), server.http_port(), options.http.host.c_str(),
              server.grpc_port(), flags.cluster.host.c_str(), cluster->control_port());
  std::fflush(stdout);
  workers = on_listening(cluster->control_port());

  shutdown.Wait();
  spdlog::info("shutting down: running requests may finish within {} s",
               flags.front_end.shutdown_timeout_s);
  server.Shutdown();
  cluster->SetReadyCallback(nullptr);
  spdlog::info("bye");
  return 0;
}

}  // namespace switchyard
