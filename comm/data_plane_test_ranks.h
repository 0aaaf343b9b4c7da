// Ranks on the host network within one test process, each with a data plane of its own. Linked by
// tests only.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "comm/data_plane.h"
#include "kernels/check.h"

namespace switchyard {

// A communicator together with the data plane that made it.
class RankOfItsOwn final : public Communicator {
 public:
  RankOfItsOwn(std::unique_ptr<DataPlane> plane, const GroupSpec& spec) : plane_(std::move(plane)) {
    auto communicator =
        plane_->Join(spec, std::chrono::steady_clock::now() + std::chrono::minutes(2));
    SY_CHECK(communicator.ok());
    communicator_ = *std::move(communicator);
  }
  int32_t rank() const override { return communicator_->rank(); }
  int32_t size() const override { return communicator_->size(); }
  absl::Status Start(int32_t group, std::span<const SendOp> sends,
                     std::span<RecvOp> recvs) override {
    return communicator_->Start(group, sends, recvs);
  }
  absl::Status Wait(int32_t group, std::chrono::steady_clock::time_point deadline) override {
    return communicator_->Wait(group, deadline);
  }
  void Abort(const absl::Status& reason) override { communicator_->Abort(reason); }

 private:
  std::unique_ptr<DataPlane> plane_;
  std::unique_ptr<Communicator> communicator_;
};

inline std::unique_ptr<DataPlane> MakePlane(const DataPlaneOptions& options = {}) {
  auto plane = DataPlane::Create(options);
  SY_CHECK(plane.ok());
  return *std::move(plane);
}

inline std::vector<std::unique_ptr<Communicator>> MakeNetworkRanks(
    int32_t size, size_t eager_bytes = DataPlaneOptions{}.eager_bytes) {
  std::vector<std::unique_ptr<DataPlane>> planes;
  GroupSpec spec{.epoch = 7, .rank = 0, .members = {}, .secret = "of epoch 7"};
  for (int32_t rank = 0; rank < size; ++rank) {
    planes.push_back(MakePlane({.eager_bytes = eager_bytes}));
    spec.members.push_back({planes.back()->address()});
  }
  std::vector<std::unique_ptr<Communicator>> communicators;
  for (auto& plane : planes) {
    communicators.push_back(std::make_unique<RankOfItsOwn>(std::move(plane), spec));
    ++spec.rank;
  }
  return communicators;
}

}  // namespace switchyard
