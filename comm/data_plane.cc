#include "comm/data_plane.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/network_group.h"
#include "comm/tcp_link.h"
#include "kernels/check.h"
#include "kernels/mutex.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;
using ConnectionId = TcpLink::ConnectionId;

constexpr size_t kMaxSecretBytes = 256;
constexpr int32_t kMaxRanks = 4096;
constexpr size_t kMaxStrangers = 256;  // connections without a valid hello of the live epoch
constexpr int kMaxEvents = 32;
constexpr std::chrono::hours kMaxSleep(1);
constexpr std::chrono::seconds kHousekeeping(1);  // the own thread looks at expired connections
constexpr std::chrono::milliseconds kAcceptPause(100);  // after too many open files
// The thread of the data plane leaves the work to a rank that waited this recently.
constexpr std::chrono::milliseconds kRankLooksAfter(1);

bool SecretsAreEqual(std::string_view a, std::string_view b) {  // in constant time
  if (a.size() != b.size()) return false;
  unsigned char difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  return difference == 0;
}

class HostDataPlane final : public DataPlane, public TcpLink::Sink, public NetworkGroup::Wire {
 public:
  explicit HostDataPlane(const DataPlaneOptions& options) : options_(options) {}

  absl::Status Open() {
    absl::StatusOr<std::unique_ptr<TcpLink>> link = TcpLink::Create(options_.host, this);
    if (!link.ok()) return link.status();
    address_ = (*link)->address();
    link_ = *std::move(link);
    thread_ = std::thread([this] { Run(); });
    return absl::OkStatus();
  }

  ~HostDataPlane() override {
    if (!thread_.joinable()) return;
    {
      MutexLock lock(mu_);
      SY_CHECK(group_ == nullptr);
      stop_ = true;
      owner_free_.NotifyOne();
    }
    link_->Wake();
    thread_.join();
    MutexLock lock(mu_);
    // Peers read what was sent to them, and close their ends.
    while (std::ranges::any_of(
        connections_, [](const auto& entry) { return entry.second.role == Role::kLingering; })) {
      Drive(next_expiry_);
    }
  }

  const std::string& address() const override { return address_; }
  const char* transport() const override { return "tcp"; }
  uint64_t discarded_messages() const override {
    MutexLock lock(mu_);
    return discarded_;
  }
  uint64_t refused_messages() const override {
    MutexLock lock(mu_);
    return refused_;
  }

  absl::StatusOr<std::unique_ptr<Communicator>> Join(const GroupSpec& spec,
                                                     Clock::time_point deadline) override;

  // For the communicator.
  absl::Status Start(std::span<const SendOp> sends, std::span<RecvOp> recvs);
  absl::Status Wait(Clock::time_point deadline);
  void Abort(const absl::Status& reason);
  void Leave();

 private:
  enum class Role : uint8_t {
    kStranger,   // accepted, no hello yet
    kEarly,      // accepted, its hello is of an epoch to come
    kMember,     // accepted, of the live epoch
    kOwn,        // opened by this rank, of the live epoch
    kLingering,  // of an epoch that is over here; the other end closes
  };
  struct Connection {
    Role role = Role::kStranger;
    int32_t rank = -1;                                     // of the other end, once known
    WireHeader hello;                                      // kEarly
    std::string secret;                                    // kEarly
    Clock::time_point expires = Clock::time_point::max();  // then it is closed
  };

  void Run();
  void Park(uint64_t seen) SY_REQUIRES(mu_);
  void Drive(Clock::time_point until) SY_REQUIRES(mu_);
  void Expire() SY_REQUIRES(mu_);
  void SetExpiry(Connection& connection, Clock::time_point expires) SY_REQUIRES(mu_);
  void LeaveIfFailed() SY_REQUIRES(mu_);
  void CloseAndForget(ConnectionId id) SY_REQUIRES(mu_);
  void Refuse(ConnectionId id) SY_REQUIRES(mu_);
  void SendBye(ConnectionId id, uint64_t epoch, int32_t to) SY_REQUIRES(mu_);
  void Linger(ConnectionId id) SY_REQUIRES(mu_);
  ConnectionId Channel(int32_t peer) const SY_REQUIRES(mu_);
  bool IsChannel(const Connection& connection) const SY_REQUIRES(mu_);
  void OnBye(ConnectionId id) SY_REQUIRES(mu_);
  void Lose(int32_t rank, const std::string& why) SY_REQUIRES(mu_);
  void OnHello(ConnectionId id, const WireHeader& hello, std::string secret) SY_REQUIRES(mu_);
  void Welcome(ConnectionId id, const WireHeader& hello, const std::string& secret)
      SY_REQUIRES(mu_);
  size_t NumStrangers() const SY_REQUIRES(mu_);

  // TcpLink::Sink and NetworkGroup::Wire. Called with the lock held, from the calls into them.
  void OnAccepted(ConnectionId id) SY_REQUIRES(mu_) override;
  std::byte* OnHeader(ConnectionId id, const WireHeader& header) SY_REQUIRES(mu_) override;
  void OnMessage(ConnectionId id, const WireHeader& header, std::span<const std::byte> payload)
      SY_REQUIRES(mu_) override;
  void OnMalformed(ConnectionId id) SY_REQUIRES(mu_) override;
  void OnBroken(ConnectionId id, const std::string& why) SY_REQUIRES(mu_) override;
  void OnSent(uint64_t cookie) SY_REQUIRES(mu_) override;
  void Send(int32_t peer, const WireHeader& header, std::span<const std::byte> payload)
      SY_REQUIRES(mu_) override;
  void DropIncoming(int32_t peer) SY_REQUIRES(mu_) override;
  void CutOff(int32_t peer) SY_REQUIRES(mu_) override;

  // Constant after Open().
  const DataPlaneOptions options_;
  std::string address_;
  std::thread thread_;

  mutable Mutex mu_;
  std::unique_ptr<TcpLink> link_ SY_PT_GUARDED_BY(mu_);  // but for what it says
  std::unordered_map<ConnectionId, Connection> connections_ SY_GUARDED_BY(mu_);
  Clock::time_point next_expiry_ SY_GUARDED_BY(mu_) = Clock::time_point::max();
  Clock::time_point next_accept_ SY_GUARDED_BY(mu_) = Clock::time_point::max();
  uint64_t discarded_ SY_GUARDED_BY(mu_) = 0;
  uint64_t refused_ SY_GUARDED_BY(mu_) = 0;
  bool stop_ SY_GUARDED_BY(mu_) = false;

  bool has_joined_ SY_GUARDED_BY(mu_) = false;
  GroupSpec spec_ SY_GUARDED_BY(mu_);  // of the newest epoch
  std::unique_ptr<NetworkGroup> group_ SY_GUARDED_BY(mu_);
  bool left_ SY_GUARDED_BY(mu_) = false;                   // peers were told
  std::vector<ConnectionId> own_ SY_GUARDED_BY(mu_);       // [size]; 0: none
  std::vector<ConnectionId> accepted_ SY_GUARDED_BY(mu_);  // [size]; 0: none

  // Who looks after the link: the rank's thread while it is in Wait, else the own thread.
  bool rank_drives_ SY_GUARDED_BY(mu_) = false;
  uint64_t num_waits_ SY_GUARDED_BY(mu_) = 0;
  bool owner_parked_ SY_GUARDED_BY(mu_) = false;  // wants to be told when the rank stops
  CondVar owner_free_;
};

class NetworkCommunicator final : public Communicator {
 public:
  NetworkCommunicator(HostDataPlane* plane, int32_t rank, int32_t size)
      : plane_(plane), rank_(rank), size_(size) {}
  ~NetworkCommunicator() override { plane_->Leave(); }
  int32_t rank() const override { return rank_; }
  int32_t size() const override { return size_; }
  absl::Status Start(std::span<const SendOp> sends, std::span<RecvOp> recvs) override {
    return plane_->Start(sends, recvs);
  }
  absl::Status Wait(Clock::time_point deadline) override { return plane_->Wait(deadline); }
  void Abort(const absl::Status& reason) override { plane_->Abort(reason); }

 private:
  HostDataPlane* const plane_;
  const int32_t rank_;
  const int32_t size_;
};

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

absl::Status HostDataPlane::Start(std::span<const SendOp> sends, std::span<RecvOp> recvs) {
  MutexLock lock(mu_);
  if (absl::Status status = group_->Post(sends, recvs); !status.ok()) group_->Fail(status);
  LeaveIfFailed();
  link_->Flush();
  return group_->error();
}

absl::Status HostDataPlane::Wait(Clock::time_point deadline) {
  MutexLock lock(mu_);
  rank_drives_ = true;
  ++num_waits_;
  while (group_->error().ok() && !group_->Done()) {
    if (Clock::now() >= deadline) {
      group_->Fail(absl::DeadlineExceededError(group_->LatePeers()));
    } else {
      Drive(deadline);
    }
  }
  LeaveIfFailed();
  group_->EndGroup();
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

// A rank with an error is lost to its peers. What it owes them goes first, but no bytes of the
// caller, whose buffers are free now: a connection that is in the middle of them ends with them.
void HostDataPlane::LeaveIfFailed() {
  if (group_ == nullptr || group_->error().ok() || std::exchange(left_, true)) return;
  for (int32_t peer = 0; peer < static_cast<int32_t>(own_.size()); ++peer) {
    // Without a channel the peer has not said hello: it hears it on this rank's connection.
    const ConnectionId channel = Channel(peer);
    const ConnectionId speaks = channel != 0 ? channel : own_[static_cast<size_t>(peer)];
    if (speaks != 0 && group_->IsWriting(peer)) {
      CloseAndForget(speaks);
    } else if (speaks != 0) {
      SendBye(speaks, spec_.epoch, peer);
    }
  }
  for (const auto* connections : {&own_, &accepted_}) {
    for (const ConnectionId id : *connections) {
      const auto it = connections_.find(id);
      if (it != connections_.end() && it->second.role != Role::kLingering) Linger(id);
    }
  }
  own_.assign(own_.size(), 0);
  accepted_.assign(accepted_.size(), 0);
  link_->Flush();
}

void HostDataPlane::SendBye(ConnectionId id, uint64_t epoch, int32_t to) {
  WireHeader bye;
  bye.type = WireType::kBye;
  bye.epoch = epoch;
  bye.to = to;
  link_->Send(id, bye, {}, /*cookie=*/0);
  Linger(id);
}

void HostDataPlane::Linger(ConnectionId id) {
  Connection& connection = connections_[id];
  connection.role = Role::kLingering;
  SetExpiry(connection, Clock::now() + options_.linger);
}

// The own thread.
void HostDataPlane::Run() {
  MutexLock lock(mu_);
  uint64_t seen = 0;
  while (!stop_) {
    if (rank_drives_ || num_waits_ != seen) {
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

void HostDataPlane::SetExpiry(Connection& connection, Clock::time_point expires) {
  connection.expires = expires;
  next_expiry_ = std::min(next_expiry_, expires);
}

void HostDataPlane::Expire() {
  const Clock::time_point now = Clock::now();
  std::vector<ConnectionId> expired;
  if (next_accept_ <= now) {
    next_accept_ = Clock::time_point::max();
    link_->ResumeAccept();
  }
  next_expiry_ = next_accept_;
  for (const auto& [id, connection] : connections_) {
    if (connection.expires <= now) {
      expired.push_back(id);
    } else {
      next_expiry_ = std::min(next_expiry_, connection.expires);
    }
  }
  for (const ConnectionId id : expired) {
    if (connections_[id].role == Role::kLingering) {
      CloseAndForget(id);
    } else {
      Refuse(id);
    }
  }
}

void HostDataPlane::CloseAndForget(ConnectionId id) {
  if (connections_.erase(id) > 0) link_->Close(id);
}

void HostDataPlane::Refuse(ConnectionId id) {
  ++refused_;
  CloseAndForget(id);
}

size_t HostDataPlane::NumStrangers() const {
  return static_cast<size_t>(std::ranges::count_if(connections_, [](const auto& entry) {
    return entry.second.role == Role::kStranger || entry.second.role == Role::kEarly;
  }));
}

void HostDataPlane::OnAccepted(ConnectionId id) {
  const bool is_full = NumStrangers() >= kMaxStrangers;
  SetExpiry(connections_[id], Clock::now() + options_.hello_timeout);
  if (is_full) Refuse(id);
}

// Two ranks speak on the connection that the lower one opened. The higher one's only shows that it
// has joined, and that the lower one lives until it has said hello.
ConnectionId HostDataPlane::Channel(int32_t peer) const {
  return (peer > spec_.rank ? own_ : accepted_)[static_cast<size_t>(peer)];
}

bool HostDataPlane::IsChannel(const Connection& connection) const {
  return connection.role == (connection.rank > spec_.rank ? Role::kOwn : Role::kMember);
}

// Where the payload goes; checks what must be known before it is read.
std::byte* HostDataPlane::OnHeader(ConnectionId id, const WireHeader& header) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return nullptr;
  const Connection& connection = it->second;
  const WireType type = header.type;
  bool is_legal = false;
  bool is_of_group = false;
  switch (connection.role) {
    case Role::kStranger:
      is_legal = type == WireType::kHello;
      break;
    case Role::kEarly:
      is_legal = type == WireType::kBye;  // it was not welcomed yet
      break;
    case Role::kLingering:
      if (type != WireType::kBye && type != WireType::kWelcome) ++discarded_;
      link_->DropIncoming(id);
      if (type == WireType::kBye) CloseAndForget(id);
      return nullptr;
    case Role::kMember:
    case Role::kOwn:
      is_of_group = IsChannel(connection) && type != WireType::kHello &&
                    type != WireType::kWelcome && type != WireType::kBye;
      is_legal = header.epoch == spec_.epoch &&
                 (is_of_group || type == WireType::kBye ||
                  (type == WireType::kWelcome && connection.role == Role::kOwn));
      break;
  }
  if (!is_legal || (header.payload > 0 && !is_of_group && type != WireType::kHello)) {
    OnMalformed(id);
    return nullptr;
  }
  return is_of_group ? group_->OnHeader(connection.rank, header) : nullptr;
}

void HostDataPlane::OnMessage(ConnectionId id, const WireHeader& header,
                              std::span<const std::byte> payload) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  const int32_t rank = it->second.rank;
  switch (header.type) {
    case WireType::kHello:
      return OnHello(id, header,
                     std::string(reinterpret_cast<const char*>(payload.data()), payload.size()));
    case WireType::kWelcome:
      if (IsChannel(it->second)) group_->OnConnected(rank);
      return;
    case WireType::kBye:
      return OnBye(id);
    default:
      return group_->OnMessage(rank, header);
  }
}

void HostDataPlane::OnBye(ConnectionId id) {
  const Connection connection = connections_[id];
  if (connection.role == Role::kEarly) return CloseAndForget(id);
  Lose(connection.rank, "it has left the epoch");
}

// Nothing more is said to this peer, nor heard from it.
void HostDataPlane::Lose(int32_t rank, const std::string& why) {
  group_->OnLost(rank, why);
  CloseAndForget(std::exchange(own_[static_cast<size_t>(rank)], 0));
  CloseAndForget(std::exchange(accepted_[static_cast<size_t>(rank)], 0));
}

void HostDataPlane::OnHello(ConnectionId id, const WireHeader& hello, std::string secret) {
  Connection& connection = connections_[id];
  connection.expires = Clock::time_point::max();
  if (has_joined_ && (hello.epoch < spec_.epoch || (hello.epoch == spec_.epoch && left_))) {
    if (hello.epoch < spec_.epoch) ++discarded_;
    return SendBye(id, hello.epoch, hello.from);
  }
  if (has_joined_ && hello.epoch == spec_.epoch) return Welcome(id, hello, secret);
  connection.role = Role::kEarly;
  SetExpiry(connection, Clock::now() + options_.early_timeout);
  connection.hello = hello;
  connection.secret = std::move(secret);
}

void HostDataPlane::Welcome(ConnectionId id, const WireHeader& hello, const std::string& secret) {
  const auto size = static_cast<int32_t>(accepted_.size());
  if (!SecretsAreEqual(secret, spec_.secret) || hello.to != spec_.rank || hello.from < 0 ||
      hello.from >= size || hello.from == spec_.rank || hello.size != static_cast<uint64_t>(size) ||
      accepted_[static_cast<size_t>(hello.from)] != 0) {
    return Refuse(id);
  }
  Connection& connection = connections_[id];
  connection = {.role = Role::kMember, .rank = hello.from, .hello = {}, .secret = {}};
  accepted_[static_cast<size_t>(hello.from)] = id;
  WireHeader welcome;
  welcome.type = WireType::kWelcome;
  welcome.epoch = spec_.epoch;
  welcome.from = spec_.rank;
  welcome.to = hello.from;
  link_->Send(id, welcome, {}, /*cookie=*/0);
  // It has joined, so it will read what follows our hello.
  if (Channel(hello.from) != 0) group_->OnConnected(hello.from);
  if (hello.from < spec_.rank)
    CloseAndForget(std::exchange(own_[static_cast<size_t>(hello.from)], 0));
}

void HostDataPlane::OnMalformed(ConnectionId id) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  const Role role = it->second.role;
  const int32_t rank = it->second.rank;
  if (role != Role::kMember && role != Role::kOwn) return Refuse(id);
  CutOff(rank);
  group_->Fail(absl::DataLossError(absl::StrCat("rank ", rank, " sent a malformed message")));
}

void HostDataPlane::CutOff(int32_t peer) {
  ++refused_;
  CloseAndForget(std::exchange(own_[static_cast<size_t>(peer)], 0));
  CloseAndForget(std::exchange(accepted_[static_cast<size_t>(peer)], 0));
}

void HostDataPlane::OnBroken(ConnectionId id, const std::string& why) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  const Connection connection = it->second;
  CloseAndForget(id);
  if (connection.role != Role::kOwn && connection.role != Role::kMember) return;
  auto& ids = connection.role == Role::kOwn ? own_ : accepted_;
  ids[static_cast<size_t>(connection.rank)] = 0;
  // The end of a connection that nobody speaks on says nothing while, or until, there is the other.
  const bool was_only_one = connection.role == Role::kOwn && Channel(connection.rank) == 0;
  if (IsChannel(connection) || was_only_one) Lose(connection.rank, why);
}

void HostDataPlane::OnSent(uint64_t cookie) { group_->OnWritten(static_cast<int32_t>(cookie - 1)); }

void HostDataPlane::Send(int32_t peer, const WireHeader& header,
                         std::span<const std::byte> payload) {
  link_->Send(Channel(peer), header, payload,
              payload.empty() ? 0 : static_cast<uint64_t>(peer) + 1);
}

void HostDataPlane::DropIncoming(int32_t peer) { link_->DropIncoming(Channel(peer)); }

}  // namespace

absl::StatusOr<std::unique_ptr<DataPlane>> DataPlane::Create(const DataPlaneOptions& options) {
  auto plane = std::make_unique<HostDataPlane>(options);
  if (absl::Status status = plane->Open(); !status.ok()) return status;
  return plane;
}

}  // namespace switchyard
