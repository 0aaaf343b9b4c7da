// Server: the front end of `switchyard serve`: HTTP and gRPC listeners over one FrontEnd. Owned by
// main(), called from one thread. Its life:
//
//   Server server(options);         // before the model is loaded, and before the Scheduler
//   server.Start();                 // listens; answers 503 "loading 43 %"
//   server.SetLoading(43);          // from any thread
//   scheduler.SetStepObserver(server.step_observer());
//   server.SetEngine(engine);       // ready
//   shutdown.Wait();                // SIGTERM
//   server.Shutdown();              // drains; then no listener and no request is left
//   …                               // the Scheduler is destroyed, then the Server
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "scheduler/scheduler.h"
#include "server/engine.h"
#include "server/front_end.h"
#include "server/grpc_server.h"
#include "server/http_server.h"

namespace switchyard {

struct ServerOptions {
  HttpServerOptions http;
  FrontEndOptions front_end;
  GrpcServerOptions grpc;
  std::chrono::milliseconds shutdown_timeout{30'000};  // for running requests to finish
};

class Server {
 public:
  explicit Server(const ServerOptions& options);
  ~Server();  // shuts down at once if Shutdown was not called

  // kUnavailable, with the address, when a port cannot be bound.
  absl::Status Start();
  uint16_t http_port() const;  // after Start
  uint16_t grpc_port() const;

  void SetLoading(int percent);
  void SetWaitsFor(std::function<std::string()> waits_for);   // instead of a percentage
  void SetCluster(std::function<ClusterSnapshot()> cluster);  // before SetEngine
  void SetEngine(Engine engine);
  std::function<void(const StepObservation&)> step_observer();

  // Refuses new work (503, Retry-After), waits for what runs, at most shutdown_timeout, ends the
  // rest with an error, and closes the listeners.
  void Shutdown();

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace switchyard
