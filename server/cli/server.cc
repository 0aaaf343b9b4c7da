#include <CLI/CLI.hpp>
#include <memory>

#include "server/cli/cluster_engine.h"
#include "server/cli/command.h"
#include "server/cli/front_end_flags.h"
#include "server/cli/local_engine.h"
#include "server/cli/model_text.h"

namespace switchyard {
namespace {

void AddClusterFlags(CLI::App* app, ClusterFlags* flags) {
  ClusterOptions& cluster = flags->cluster;
  app->add_option("--control-host", cluster.host, "address on which workers register")
      ->capture_default_str();
  app->add_option("--control-port", cluster.control_port,
                  "port on which workers register (0: any free one)")
      ->capture_default_str();
  app->add_option("--cluster-token", cluster.token, "what workers must present")
      ->envname("SWITCHYARD_CLUSTER_TOKEN");
  app->add_option("--cluster-token-file", flags->token_file, "a file whose first line is the token")
      ->check(CLI::ExistingFile);
  app->add_option("--cluster-cert", cluster.certificate, "mutual TLS: own certificate, PEM")
      ->check(CLI::ExistingFile);
  app->add_option("--cluster-key", cluster.private_key, "mutual TLS: own private key, PEM")
      ->check(CLI::ExistingFile);
  app->add_option("--cluster-ca", cluster.ca, "mutual TLS: who signs the workers' certificates")
      ->check(CLI::ExistingFile);
  AddBalanceFlags(app, &flags->planner);
  app->add_option("--min-expert-workers", cluster.min_expert_workers,
                  "expert workers that the first placement waits for")
      ->capture_default_str()
      ->check(CLI::Range(1, 256));
  app->add_option("--survive-expert-failures", cluster.survive_expert_failures,
                  "lost expert workers whose experts the others have room for at once")
      ->capture_default_str()
      ->check(CLI::Range(0, 255));
  app->add_option("--replica-slots", cluster.replica_slots,
                  "experts per layer that an expert worker may hold as replicas of hot ones")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
  AddLoadBudgetFlag(app, &cluster);
  app->add_option("--placement-interval", flags->placement_interval_s,
                  "seconds between looks at the experts' load, to move homes and replicas (0: they "
                  "stay)")
      ->capture_default_str()
      ->check(CLI::Range(0, 86400));
  app->add_option("--no-home-timeout", flags->no_home_timeout_s,
                  "seconds that requests wait for a worker when too few are left; then 503")
      ->capture_default_str()
      ->check(CLI::Range(0, 86400));
  app->add_option("--stall-timeout", flags->stall_timeout_s,
                  "seconds that a worker may be busy without progress")
      ->capture_default_str()
      ->check(CLI::Range(1, 86400));
}

}  // namespace

Command AddServer(CLI::App* parent) {
  CLI::App* app = parent->add_subcommand(
      "server", "front end and scheduler for workers in other processes or on other machines");
  app->footer(
      "Listens like `serve`, computes nothing itself: `switchyard worker --scheduler HOST:PORT` "
      "processes do.\nIt is ready when one attention worker is up and every expert has a home; GET "
      "/admin/cluster shows them.\n\nExample: switchyard server --model models/demo --port 8000 "
      "--control-port 9000");
  auto flags = std::make_shared<ClusterFlags>();
  AddModelFlag(app, &flags->model.model_dir);
  app->add_option("--dtype", flags->model.dtype, "auto (as stored), float32 or bfloat16")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}));
  AddWeightFormatFlags(app, &flags->model.formats);
  app->add_option("--max-model-len", flags->model.max_model_len,
                  "prompt + output tokens of a sequence (0: as the model says)")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  AddStepFlags(app, &flags->scheduler);
  AddFrontEndFlags(app, &flags->front_end);
  AddClusterFlags(app, flags.get());
  return {app, [flags] { return RunCluster(*flags, [](uint16_t) { return nullptr; }); }};
}

}  // namespace switchyard
