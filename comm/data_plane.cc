#include "comm/data_plane.h"

#include <sys/epoll.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/host_data_plane.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

constexpr size_t kMaxSecretBytes = 256;
constexpr int32_t kMaxRanks = 4096;
constexpr int kMaxEvents = 32;
constexpr std::chrono::hours kMaxSleep(1);
constexpr std::chrono::seconds kHousekeeping(1);  // the own thread looks at expired connections
constexpr std::chrono::milliseconds kAcceptPause(100);  // after too many open files
// The thread of the data plane looks this often whether the rank still waits now and then. It takes
// over at the first look after which it did not, or at the tenth where nothing is under way.
constexpr std::chrono::milliseconds kRankLooksAfter(2);
constexpr int kIdleLooks = 10;

class NetworkCommunicator final : public Communicator {
 public:
  NetworkCommunicator(HostDataPlane* plane, int32_t rank, int32_t size)
      : plane_(plane), rank_(rank), size_(size) {}
  ~NetworkCommunicator() override { plane_->Leave(); }
  int32_t rank() const override { return rank_; }
  int32_t size() const override { return size_; }
  absl::Status Start(int32_t group, std::span<const SendOp> sends,
                     std::span<RecvOp> recvs) override {
    return plane_->Start(group, sends, recvs);
  }
  absl::Status Wait(int32_t group, std::chrono::steady_clock::time_point deadline) override {
    return plane_->Wait(group, deadline);
  }
  void Abort(const absl::Status& reason) override { plane_->Abort(reason); }

 private:
  HostDataPlane* const plane_;
  const int32_t rank_;
  const int32_t size_;
};

}  // namespace

absl::Status HostDataPlane::Open() {
  absl::StatusOr<std::unique_ptr<TcpLink>> link = TcpLink::Create(options_.host, this);
  if (!link.ok()) return link.status();
  address_ = (*link)->address();
  link_ = *std::move(link);
  thread_ = std::thread([this] { Run(); });
  return absl::OkStatus();
}

HostDataPlane::~HostDataPlane() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(mu_);
    SY_CHECK(group_ == nullptr);
    link_->StopAccept();
    stop_ = true;
    owner_free_.NotifyOne();
  }
  link_->Wake();
  thread_.join();
  MutexLock lock(mu_);
  // Peers read what was sent to them, and close their ends.
  const Clock::time_point deadline = Clock::now() + options_.linger;
  const auto lingers = [](const auto& entry) { return entry.second.role == Role::kLingering; };
  while (std::ranges::any_of(connections_, lingers) && Clock::now() < deadline) Drive(deadline);
}

absl::StatusOr<std::unique_ptr<Communicator>> HostDataPlane::Join(const GroupSpec& spec,
                                                                  Clock::time_point deadline) {
  const auto size = static_cast<int32_t>(spec.members.size());
  if (size < 1 || size > kMaxRanks || spec.rank < 0 || spec.rank >= size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", spec.rank, " of ", spec.members.size(), " members"));
  }
  if (spec.secret.empty() || spec.secret.size() > kMaxSecretBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a secret of ", spec.secret.size(), " bytes; 1 to ", kMaxSecretBytes));
  }
  MutexLock lock(mu_);
  if (Clock::now() >= deadline) return absl::DeadlineExceededError("no time left to join");
  if (group_ != nullptr || (has_joined_ && spec.epoch <= spec_.epoch)) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot join epoch ", spec.epoch, ": epoch ", spec_.epoch,
                     group_ != nullptr ? " lives" : " was joined"));
  }
  has_joined_ = true;
  has_waited_ = false;
  owner_free_.NotifyOne();
  spec_ = spec;
  left_ = false;
  own_.assign(static_cast<size_t>(size), 0);
  accepted_.assign(static_cast<size_t>(size), 0);
  group_ = std::make_unique<NetworkGroup>(this, spec.epoch, spec.rank, size, options_.eager_bytes);
  for (int32_t peer = 0; peer < size; ++peer) {
    if (peer == spec.rank) continue;
    const absl::StatusOr<ConnectionId> id =
        link_->Connect(spec.members[static_cast<size_t>(peer)].address);
    if (!id.ok()) {
      group_->OnLost(peer, std::string(id.status().message()));
      continue;
    }
    own_[static_cast<size_t>(peer)] = *id;
    connections_[*id] = {.role = Role::kOwn, .rank = peer, .hello = {}, .secret = {}};
    WireHeader hello;
    hello.type = WireType::kHello;
    hello.epoch = spec.epoch;
    hello.from = spec.rank;
    hello.to = peer;
    hello.size = static_cast<uint64_t>(size);
    link_->Send(*id, hello, std::as_bytes(std::span(spec.secret)), /*cookie=*/0);
  }
  std::vector<ConnectionId> early;
  for (const auto& [id, connection] : connections_) {
    if (connection.role == Role::kEarly) early.push_back(id);
  }
  for (const ConnectionId id : early) {
    const Connection connection = connections_[id];
    OnHello(id, connection.hello, connection.secret);
  }
  link_->Flush();
  link_->Wake();
  return std::make_unique<NetworkCommunicator>(this, spec.rank, size);
}

absl::Status HostDataPlane::Start(int32_t group, std::span<const SendOp> sends,
                                  std::span<RecvOp> recvs) {
  MutexLock lock(mu_);
  if (absl::Status status = group_->Post(group, sends, recvs); !status.ok()) group_->Fail(status);
  LeaveIfFailed();
  link_->Flush();
  return group_->error();
}

absl::Status HostDataPlane::Wait(int32_t group, Clock::time_point deadline) {
  MutexLock lock(mu_);
  rank_drives_ = true;
  has_waited_ = true;
  ++num_waits_;
  while (group_->error().ok() && !group_->Done(group)) {
    if (Clock::now() >= deadline) {
      group_->Fail(absl::DeadlineExceededError(group_->LatePeers(group)));
    } else {
      Drive(deadline);
    }
  }
  LeaveIfFailed();
  group_->EndGroup(group);
  rank_drives_ = false;
  if (owner_parked_) owner_free_.NotifyOne();
  return group_->error();
}

void HostDataPlane::Abort(const absl::Status& reason) {
  SY_CHECK(!reason.ok());
  MutexLock lock(mu_);
  group_->Fail(reason);
  LeaveIfFailed();
  link_->Wake();
}

void HostDataPlane::Leave() {
  MutexLock lock(mu_);
  group_->Fail(absl::CancelledError("the communicator is destroyed"));
  LeaveIfFailed();
  group_.reset();
}

// The own thread.
void HostDataPlane::Run() {
  MutexLock lock(mu_);
  uint64_t seen = 0;
  int looks = kIdleLooks;  // since the rank waited last
  while (!stop_) {
    looks = rank_drives_ || num_waits_ != seen ? 0 : std::min(looks + 1, kIdleLooks);
    const bool idle = has_waited_ && (group_ == nullptr || group_->Idle());
    if (looks == 0 || (looks < kIdleLooks && idle)) {
      seen = num_waits_;
      Park(seen);
      continue;
    }
    Drive(Clock::now() + kHousekeeping);
    // Whatever happened, perhaps it was for a rank that has begun to wait meanwhile.
    if (rank_drives_) link_->Wake();
    LeaveIfFailed();
  }
}

// A rank that waits often is not disturbed: it need not say when it stops, and is looked at again
// soon. One that waits long is left alone until it says so.
void HostDataPlane::Park(uint64_t seen) {
  owner_free_.WaitUntil(mu_, Clock::now() + kRankLooksAfter);
  owner_parked_ = true;
  while (rank_drives_ && num_waits_ == seen && !stop_) owner_free_.Wait(mu_);
  owner_parked_ = false;
}

// Waits for events until `until` at most, and handles them. Once.
void HostDataPlane::Drive(Clock::time_point until) {
  if (Clock::now() >= next_expiry_) Expire();
  epoll_event events[kMaxEvents];
  int num_events = 0;
  if (!link_->has_news()) {
    const int epoll_fd = link_->epoll_fd();
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(
        std::min({until, next_expiry_, Clock::now() + kMaxSleep}) - Clock::now());
    const auto timeout_ms = static_cast<int>(std::max<int64_t>(left.count(), 0));
    mu_.Unlock();
    num_events = epoll_wait(epoll_fd, events, kMaxEvents, timeout_ms);
    mu_.Lock();
  }
  link_->Dispatch({events, static_cast<size_t>(std::max(num_events, 0))});
  if (link_->accept_paused() && next_accept_ == Clock::time_point::max()) {
    next_accept_ = Clock::now() + kAcceptPause;
    next_expiry_ = std::min(next_expiry_, next_accept_);
  }
}

absl::StatusOr<std::unique_ptr<DataPlane>> DataPlane::Create(const DataPlaneOptions& options) {
  auto plane = std::make_unique<HostDataPlane>(options);
  if (absl::Status status = plane->Open(); !status.ok()) return status;
  return plane;
}

}  // namespace switchyard
