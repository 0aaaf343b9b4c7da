// One Generate call: from the message to a GenerationRequest, and from deltas to messages. Internal
// to the gRPC server: it exposes gRPC types.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>

#include "absl/status/status.h"
#include "kernels/mutex.h"
#include "server/front_end.h"
#include "server/generation_request.h"
#include "switchyard/v1/inference.pb.h"

namespace switchyard {

// How many calls run. Outlives them.
class GrpcCallCount {
 public:
  explicit GrpcCallCount(int max_calls) : max_(max_calls) {}
  void Add() SY_EXCLUDES(mu_);
  void Remove() SY_EXCLUDES(mu_);
  // kResourceExhausted when there are more than may run.
  absl::Status Check() SY_EXCLUDES(mu_);
  bool WaitIdle(std::chrono::steady_clock::time_point deadline) SY_EXCLUDES(mu_);

 private:
  const int max_;
  Mutex mu_;
  CondVar idle_;
  int num_ SY_GUARDED_BY(mu_) = 0;
};

// The one mapping from absl::Status to gRPC.
grpc::Status ToGrpcStatus(const absl::Status& status);

// Types and ranges are checked; nothing of the model.
absl::StatusOr<GenerationRequest> FromProto(const v1::GenerateRequest& message);

// The reactor of a new call; it deletes itself. `message` lives until the call ends.
grpc::ServerWriteReactor<v1::GenerateResponse>* StartGrpcGenerate(
    FrontEnd* front_end, GrpcCallCount* calls, grpc::CallbackServerContext* context,
    const v1::GenerateRequest* message);

}  // namespace switchyard
