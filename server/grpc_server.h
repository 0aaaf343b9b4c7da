// GrpcServer: switchyard.v1.Inference over gRPC's callback API, with grpc.health.v1 and reflection.
// Its handlers only enqueue: preparation and output run on the front end's task pool. No gRPC type
// appears here.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/front_end.h"

namespace switchyard {

class GrpcServer {
 public:
  explicit GrpcServer(FrontEnd* front_end);  // outlives this
  ~GrpcServer();

  // The port that was bound; kUnavailable, naming the address, when that fails.
  absl::StatusOr<uint16_t> Start(const std::string& host, uint16_t port);
  void SetServing(bool serving);  // what grpc.health.v1 says
  // Waits until no call runs; false when `deadline` came first.
  bool WaitIdle(std::chrono::steady_clock::time_point deadline);
  // Refuses new calls; cancels those that still run at `deadline`. Idempotent.
  void Stop(std::chrono::system_clock::time_point deadline);

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace switchyard
