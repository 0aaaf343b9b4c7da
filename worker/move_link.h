// MoveLink: two ranks of the host network (comm/data_plane.h) within this process, over which an
// expert's packed weights are sent as a weight move sends them. For measuring what a move costs: no
// wire lies between, but sockets, copies and both ends' work do. One thread per object.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "comm/data_plane.h"
#include "kernels/backend.h"

namespace switchyard {

class MoveLink {
 public:
  // host: as DataPlaneOptions has it, whose errors these are.
  static absl::StatusOr<std::unique_ptr<MoveLink>> Create(const std::string& host);

  // Copies the packed bytes of `from` into `to`, which has its shape. Returns the time that it
  // took.
  absl::StatusOr<std::chrono::nanoseconds> Move(const MlpWeights& from, const MlpWeights& to);

 private:
  MoveLink() = default;

  struct End {
    std::unique_ptr<DataPlane> plane;
    std::unique_ptr<Communicator> communicator;
  };
  End sender_, receiver_;
  uint64_t moves_ = 0;
};

}  // namespace switchyard
