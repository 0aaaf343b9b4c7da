// Who may be a worker of a cell: a shared token in the call's metadata, mutual TLS, or both. Used
// by the scheduler's end of the control plane; the worker's end is in worker/.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace switchyard {

struct ClusterCredentials {
  std::string host;  // that will be listened on
  std::string token;
  std::string certificate, private_key, ca;  // PEM files; all three or none
};

// kInvalidArgument: only some of the files, or a host that others can reach without token and
// certificates; kNotFound: a file cannot be read.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const ClusterCredentials& options);

// `authorization: Bearer TOKEN`, compared in constant time. An empty token lets everybody in.
absl::Status CheckClusterToken(const grpc::CallbackServerContext& context,
                               const std::string& token);

}  // namespace switchyard
