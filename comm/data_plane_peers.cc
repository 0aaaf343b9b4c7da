// What peers say to a HostDataPlane, and what it says to them.
#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/host_data_plane.h"

namespace switchyard {
namespace {

// Connections that are no members of the live epoch: without a hello, early, lingering. There is
// room for those of a whole group that ends and of the next one.
constexpr size_t kMaxOthers = 256;
constexpr size_t kMaxOthersPerMember = 4;

bool SecretsAreEqual(std::string_view a, std::string_view b) {  // in constant time
  if (a.size() != b.size()) return false;
  unsigned char difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  return difference == 0;
}

}  // namespace

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
  for (const ConnectionId id : expired) EndOther(id);
}

void HostDataPlane::CloseAndForget(ConnectionId id) {
  if (connections_.erase(id) > 0) link_->Close(id);
}

void HostDataPlane::Refuse(ConnectionId id) {
  ++refused_;
  CloseAndForget(id);
}

// Whoever reaches the port may fill it: a new one counts more than the oldest.
void HostDataPlane::MakeRoom() {
  const size_t limit = std::max(kMaxOthers, kMaxOthersPerMember * spec_.members.size());
  for (;;) {
    size_t num_others = 0;
    ConnectionId oldest = 0;
    for (const auto& [id, connection] : connections_) {
      if (connection.role == Role::kMember || connection.role == Role::kOwn) continue;
      ++num_others;
      if (oldest == 0 || id < oldest) oldest = id;
    }
    if (num_others < limit) return;
    EndOther(oldest);
  }
}

void HostDataPlane::EndOther(ConnectionId id) {
  if (connections_[id].role == Role::kLingering) {
    CloseAndForget(id);
  } else {
    Refuse(id);
  }
}

void HostDataPlane::OnAccepted(ConnectionId id) {
  MakeRoom();
  SetExpiry(connections_[id], Clock::now() + options_.hello_timeout);
}

// Two ranks speak on the connection that the lower one opened. The higher one's only shows that it
// has joined, and that the lower one lives until it has said hello.
HostDataPlane::ConnectionId HostDataPlane::Channel(int32_t peer) const {
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

}  // namespace switchyard
