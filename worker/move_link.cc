#include "worker/move_link.h"

#include <array>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kDeadline{10};

}  // namespace

absl::StatusOr<std::unique_ptr<MoveLink>> MoveLink::Create(const std::string& host) {
  // The constructor is private, so make_unique cannot reach it.
  std::unique_ptr<MoveLink> link(new MoveLink());
  GroupSpec spec{.epoch = 1, .rank = 0, .members = {}, .secret = "of this process"};
  for (End* end : {&link->sender_, &link->receiver_}) {
    auto plane = DataPlane::Create({.host = host});
    if (!plane.ok()) return plane.status();
    end->plane = *std::move(plane);
    spec.members.push_back({.address = end->plane->address()});
  }
  for (End* end : {&link->sender_, &link->receiver_}) {
    auto communicator = end->plane->Join(spec, Clock::now() + kDeadline);
    if (!communicator.ok()) return communicator.status();
    end->communicator = *std::move(communicator);
    ++spec.rank;
  }
  return link;
}

absl::StatusOr<std::chrono::nanoseconds> MoveLink::Move(const MlpWeights& from,
                                                        const MlpWeights& to) {
  const auto whole = [](const Buffer& buffer) {
    return std::span<std::byte>(buffer.data(), buffer.bytes());
  };
  const std::array<std::pair<const Buffer*, const Buffer*>, 2> parts = {
      {{&from.gate_up.storage, &to.gate_up.storage}, {&from.down.storage, &to.down.storage}}};
  std::array<SendOp, 2> sends;
  std::array<RecvOp, 2> recvs;
  MessageTag tag{.step = ++moves_, .kind = MessageKind::kWeights};
  for (size_t i = 0; i < parts.size(); ++i, ++tag.part) {
    SY_CHECK_EQ(parts[i].first->bytes(), parts[i].second->bytes());
    sends[i] = {.peer = 1, .tag = tag, .data = whole(*parts[i].first)};
    recvs[i] = {.peer = 0, .tag = tag, .buffer = whole(*parts[i].second)};
  }
  const Clock::time_point start = Clock::now();
  const Clock::time_point deadline = start + kDeadline;
  // The receiver's data plane works on a thread of its own while this one waits for the sender.
  for (const absl::Status& status :
       {receiver_.communicator->Start({}, recvs), sender_.communicator->Start(sends, {}),
        sender_.communicator->Wait(deadline), receiver_.communicator->Wait(deadline)}) {
    if (!status.ok()) return status;
  }
  return Clock::now() - start;
}

}  // namespace switchyard
