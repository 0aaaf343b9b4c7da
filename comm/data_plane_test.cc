#include "comm/data_plane.h"

#include "comm/communicator_conformance.h"

namespace switchyard {
namespace {

// A communicator together with the data plane that made it: a rank's whole process.
class RankOfItsOwn final : public Communicator {
 public:
  RankOfItsOwn(std::unique_ptr<DataPlane> plane, const GroupSpec& spec) : plane_(std::move(plane)) {
    auto communicator = plane_->Join(spec, Later());
    SY_CHECK(communicator.ok());
    communicator_ = *std::move(communicator);
  }
  int32_t rank() const override { return communicator_->rank(); }
  int32_t size() const override { return communicator_->size(); }
  absl::Status Start(std::span<const SendOp> sends, std::span<RecvOp> recvs) override {
    return communicator_->Start(sends, recvs);
  }
  absl::Status Wait(std::chrono::steady_clock::time_point deadline) override {
    return communicator_->Wait(deadline);
  }
  void Abort(const absl::Status& reason) override { communicator_->Abort(reason); }

 private:
  std::unique_ptr<DataPlane> plane_;
  std::unique_ptr<Communicator> communicator_;
};

Communicators MakeRanks(int32_t size, size_t eager_bytes) {
  std::vector<std::unique_ptr<DataPlane>> planes;
  GroupSpec spec{.epoch = 7, .rank = 0, .members = {}, .secret = "of epoch 7"};
  for (int32_t rank = 0; rank < size; ++rank) {
    auto plane = DataPlane::Create({.eager_bytes = eager_bytes});
    SY_CHECK(plane.ok());
    spec.members.push_back({(*plane)->address()});
    planes.push_back(*std::move(plane));
  }
  Communicators communicators;
  for (int32_t rank = 0; rank < size; ++rank) {
    spec.rank = rank;
    communicators.push_back(
        std::make_unique<RankOfItsOwn>(std::move(planes[static_cast<size_t>(rank)]), spec));
  }
  return communicators;
}

INSTANTIATE_TEST_SUITE_P(
    Network, CommunicatorConformance,
    testing::Values(
        CommunicatorMaker{"eager", [](int32_t size) { return MakeRanks(size, 4 << 20); }},
        CommunicatorMaker{"requested", [](int32_t size) { return MakeRanks(size, 1000); }}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace switchyard
