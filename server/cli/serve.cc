#include <spdlog/spdlog.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "server/cli/command.h"
#include "server/cli/front_end_flags.h"
#include "server/cli/local_engine.h"
#include "server/cli/log.h"
#include "server/progress_bar.h"
#include "server/server.h"
#include "server/shutdown_signals.h"

namespace switchyard {
namespace {

struct ServeFlags {
  LocalEngineFlags engine;
  FrontEndFlags front_end;
};

int RunServe(ServeFlags flags) {
  const FrontEndFlags& front_end = flags.front_end;
  flags.engine.scheduler.max_queued_requests = front_end.max_queued_requests;
  ConfigureLog(front_end.log_format);
  ShutdownSignals shutdown;  // before any other thread
  const ServerOptions options = front_end.server_options();
  Server server(options);
  if (absl::Status status = server.Start(); !status.ok()) return Fail(status);

  absl::StatusOr<std::unique_ptr<LocalEngine>> loaded;
  {
    ProgressBar bar("loading", 100, /*quiet=*/front_end.log_format == "json");
    loaded = LoadLocalEngine(flags.engine,
                             {.served_model_name = front_end.served_model_name,
                              .chat_template = front_end.chat_template},
                             [&](int percent) {
                               if (shutdown.requested()) std::_Exit(0);  // nothing was accepted yet
                               server.SetLoading(percent);
                               bar.Update(percent);
                             });
  }
  if (!loaded.ok()) return Fail(loaded.status());
  Scheduler& scheduler = *(*loaded)->scheduler;
  scheduler.SetStepObserver(server.step_observer());
  scheduler.Start();
  server.SetEngine((*loaded)->engine);
  std::printf("switchyard ready http=%s:%d grpc=%s:%d model=%s\n", options.http.host.c_str(),
              server.http_port(), options.http.host.c_str(), server.grpc_port(),
              (*loaded)->engine.model.name.c_str());
  std::fflush(stdout);

  shutdown.Wait();
  spdlog::info("shutting down: running requests may finish within {} s",
               front_end.shutdown_timeout_s);
  server.Shutdown();
  spdlog::info("bye");
  return 0;
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
  return {app, [flags] { return RunServe(*flags); }};
}

}  // namespace switchyard
