// GrpcServer: switchyard.v1.Inference over gRPC's callback API, with grpc.health.v1 and reflection.
// Its handlers only enqueue: preparation and output run on the front end's task pool. A thread of
// its own has grpc.health.v1 say what FrontEnd::Health says. No gRPC type appears here.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/front_end.h"

namespace switchyard {

struct GrpcServerOptions {
  uint16_t port = 8001;  // on the HTTP server's host; 0: the system chooses
  // Generate calls at once, over all connections; more get RESOURCE_EXHAUSTED. More than the
  // scheduler runs and queues by default, so that its queue decides.
  int max_calls = 2048;
  // HTTP/2 streams of one connection; its client waits with more. One proxy may carry hundreds of
  // users, and a call that waits costs only its message.
  int max_streams_per_connection = 512;
  int max_message_bytes = 16 << 20;  // RESOURCE_EXHAUSTED beyond; as an HTTP body
  // Of gRPC's buffers over all connections. When they are used up it reads no further and refuses
  // connections.
  size_t max_buffer_bytes = 512 << 20;
  // How late grpc.health.v1 may learn that the engine failed or stalled.
  std::chrono::milliseconds health_interval{250};
};

class GrpcServer {
 public:
  GrpcServer(const GrpcServerOptions& options, FrontEnd* front_end);  // which outlives this
  ~GrpcServer();

  // The port that was bound; kUnavailable, naming the address, when that fails.
  absl::StatusOr<uint16_t> Start(const std::string& host);
  // Has grpc.health.v1 follow FrontEnd::Health at once. Any thread.
  void UpdateHealth();
  // Waits until no call runs; false when `deadline` came first.
  bool WaitIdle(std::chrono::steady_clock::time_point deadline);
  // Refuses new calls; cancels those that still run at `deadline`. Idempotent.
  void Stop(std::chrono::system_clock::time_point deadline);

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace switchyard
