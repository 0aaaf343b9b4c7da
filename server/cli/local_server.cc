#include "server/cli/local_server.h"

#include <spdlog/spdlog.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "server/cli/command.h"
#include "server/cli/log.h"
#include "server/progress_bar.h"
#include "server/server.h"
#include "server/shutdown_signals.h"

namespace switchyard {

int ServeInProcess(LocalEngineFlags engine, const FrontEndFlags& front_end,
                   const std::function<int(LocalEngine&)>& at_end) {
  engine.scheduler.max_queued_requests = front_end.max_queued_requests;
  ConfigureLog(front_end.log_format);
  ShutdownSignals shutdown;  // before any other thread
  const ServerOptions options = front_end.server_options();
  Server server(options);
  if (absl::Status status = server.Start(); !status.ok()) return Fail(status);

  absl::StatusOr<std::unique_ptr<LocalEngine>> loaded;
  {
    ProgressBar bar("loading", 100, /*quiet=*/front_end.log_format == "json");
    loaded = LoadLocalEngine(std::move(engine),
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
  server.SetCluster([engine = loaded->get()] { return engine->Snapshot(); });
  server.SetEngine((*loaded)->engine);
  std::printf("switchyard ready http=%s:%d grpc=%s:%d model=%s\n", options.http.host.c_str(),
              server.http_port(), options.http.host.c_str(), server.grpc_port(),
              (*loaded)->engine.model.name.c_str());
  std::fflush(stdout);

  shutdown.Wait();
  spdlog::info("shutting down: running requests may finish within {} s",
               front_end.shutdown_timeout_s);
  server.Shutdown();
  const int code = at_end(**loaded);
  spdlog::info("bye");
  return code;
}

}  // namespace switchyard
