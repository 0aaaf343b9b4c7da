#include "comm/tcp_link.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

constexpr uint64_t kListener = 0;  // in epoll_event::data; else a ConnectionId
constexpr uint64_t kWake = UINT64_MAX;
constexpr int kBacklog = 128;
constexpr size_t kBufferBytes = 32 << 10;
constexpr size_t kMaxMessagesPerWrite = 16;
constexpr size_t kDiscardBytes = 64 << 10;
constexpr int kMaxReads = 4;  // of one connection before the others
constexpr int kMaxAccepts = 16;
// How long a peer's system may answer nothing: no acknowledgement, and no room for more bytes.
constexpr int kConnectTimeoutMs = 10'000;
constexpr int kSilenceTimeoutMs = 3'000;
constexpr int kKeepAliveSeconds = 1;  // of silence, then between probes
constexpr int kKeepAliveProbes = 3;

absl::Status SystemError(const char* what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(errno)));
}

absl::StatusOr<sockaddr_in> ParseHost(const std::string& host) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  if (inet_pton(AF_INET, host.c_str(), &address.sin_addr) != 1)
    return absl::InvalidArgumentError(absl::StrCat("'", host, "' is not an IPv4 address"));
  return address;
}

void SetOption(int fd, int level, int name, int value) {
  (void)setsockopt(fd, level, name, &value, sizeof(value));
}

// The end of a connection is noticed without a word from the other end.
void WatchForSilence(int fd) {
  SetOption(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, kSilenceTimeoutMs);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPIDLE, kKeepAliveSeconds);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPINTVL, kKeepAliveSeconds);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPCNT, kKeepAliveProbes);
  SetOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
}

// Counts calls that may hold a Connection, so that Close() frees none under them.
class Held {
 public:
  explicit Held(int& depth) : depth_(depth) { ++depth_; }
  ~Held() { --depth_; }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

 private:
  int& depth_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TcpLink>> TcpLink::Create(const std::string& host, Sink* sink) {
  std::unique_ptr<TcpLink> link(new TcpLink(sink));
  if (absl::Status status = link->Open(host); !status.ok()) return status;
  return link;
}

absl::Status TcpLink::Open(const std::string& host) {
  absl::StatusOr<sockaddr_in> address = ParseHost(host);
  if (!address.ok()) return address.status();
  listen_fd_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (listen_fd_ < 0) return SystemError("socket");
  socklen_t length = sizeof(*address);
  if (bind(listen_fd_, reinterpret_cast<const sockaddr*>(&*address), length) != 0) {
    if (errno == EADDRNOTAVAIL) {
      return absl::InvalidArgumentError(absl::StrCat("no local interface has the address ", host));
    }
    return SystemError("bind");
  }
  if (listen(listen_fd_, kBacklog) != 0) return SystemError("listen");
  if (getsockname(listen_fd_, reinterpret_cast<sockaddr*>(&*address), &length) != 0)
    return SystemError("getsockname");
  address_ = absl::StrCat(host, ":", ntohs(address->sin_port));

  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (epoll_fd_ < 0 || wake_fd_ < 0) return SystemError("epoll or eventfd");
  for (const auto& [fd, id] : {std::pair(listen_fd_, kListener), std::pair(wake_fd_, kWake)}) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = id;
    if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) return SystemError("epoll_ctl");
  }
  discard_.resize(kDiscardBytes);
  return absl::OkStatus();
}

TcpLink::~TcpLink() {
  while (!connections_.empty()) Close(connections_.begin()->first);
  for (const int fd : {listen_fd_, epoll_fd_, wake_fd_}) {
    if (fd >= 0) close(fd);
  }
}

TcpLink::Connection* TcpLink::Find(ConnectionId id) {
  const auto it = connections_.find(id);
  return it == connections_.end() ? nullptr : it->second.get();
}

TcpLink::ConnectionId TcpLink::Add(int fd, bool connecting) {
  SetOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  if (connecting) {
    SetOption(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, kConnectTimeoutMs);
  } else {
    WatchForSilence(fd);
  }
  auto connection = std::make_unique<Connection>();
  connection->id = next_id_++;
  connection->fd = fd;
  connection->connecting = connecting;
  connection->wants_out = connecting;
  connection->buffer.resize(kBufferBytes);
  epoll_event event{};
  event.events = EPOLLIN | (connecting ? EPOLLOUT : 0u);
  event.data.u64 = connection->id;
  if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) {
    close(fd);
    return 0;
  }
  const ConnectionId id = connection->id;
  connections_[id] = std::move(connection);
  return id;
}

void TcpLink::Register(Connection& connection, bool wants_out) {
  if (connection.wants_out == wants_out) return;
  connection.wants_out = wants_out;
  epoll_event event{};
  event.events = EPOLLIN | (wants_out ? EPOLLOUT : 0u);
  event.data.u64 = connection.id;
  SY_CHECK_EQ(epoll_ctl(epoll_fd_, EPOLL_CTL_MOD, connection.fd, &event), 0);
}

absl::StatusOr<TcpLink::ConnectionId> TcpLink::Connect(const std::string& address) {
  const size_t colon = address.rfind(':');
  uint32_t port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port) ||
      port == 0 || port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat("'", address, "' is not host:port"));
  }
  absl::StatusOr<sockaddr_in> peer = ParseHost(address.substr(0, colon));
  if (!peer.ok()) return peer.status();
  peer->sin_port = htons(static_cast<uint16_t>(port));
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return SystemError("socket");
  const int result = connect(fd, reinterpret_cast<const sockaddr*>(&*peer), sizeof(*peer));
  if (result != 0 && errno != EINPROGRESS) {
    const absl::Status status = SystemError("connect");
    close(fd);
    return status;
  }
  const ConnectionId id = Add(fd, /*connecting=*/result != 0);
  if (id == 0) return absl::UnavailableError("the system watches no more connections");
  return id;
}

void TcpLink::Accept() {
  for (int i = 0; i < kMaxAccepts; ++i) {
    const int fd = accept4(listen_fd_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
      const ConnectionId id = Add(fd, /*connecting=*/false);
      if (id != 0) sink_->OnAccepted(id);
      continue;
    }
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
      accept_paused_ = true;
      SY_CHECK_EQ(epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, listen_fd_, nullptr), 0);
    }
    return;
  }
}

void TcpLink::ResumeAccept() {
  if (!accept_paused_) return;
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kListener;
  accept_paused_ = epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, listen_fd_, &event) != 0;
}

void TcpLink::StopAccept() {
  close(std::exchange(listen_fd_, -1));
  accept_paused_ = false;
}

void TcpLink::Wake() {
  const uint64_t one = 1;
  (void)!write(wake_fd_, &one, sizeof(one));
}

void TcpLink::Break(Connection& connection, std::string why) {
  if (std::exchange(connection.broken, true)) return;
  broken_.push_back({connection.id, std::move(why)});
}

void TcpLink::Send(ConnectionId id, WireHeader header, std::span<const std::byte> payload,
                   uint64_t cookie) {
  SY_CHECK_LE(payload.size(), WireHeader::kMaxPayload);
  Connection* connection = Find(id);
  if (connection == nullptr || connection->broken) {
    if (cookie != 0) sink_->OnSent(cookie);
    return;
  }
  header.payload = payload.size();
  Outgoing& out = connection->out.emplace_back();
  out.header = header;
  out.payload = payload;
  out.cookie = cookie;
  if (cookie == 0) {
    out.copy.assign(payload.begin(), payload.end());
    out.payload = out.copy;
  }
  if (!std::exchange(connection->dirty, true)) dirty_.push_back(id);
}

void TcpLink::Flush() {
  Held held(depth_);
  while (!dirty_.empty()) {
    for (const ConnectionId id : std::exchange(dirty_, {})) {
      Connection* connection = Find(id);
      if (connection == nullptr) continue;
      connection->dirty = false;
      if (!connection->connecting) Write(*connection);
    }
  }
}

void TcpLink::Write(Connection& connection) {
  while (!connection.closed && !connection.broken && !connection.out.empty()) {
    iovec parts[2 * kMaxMessagesPerWrite];
    size_t num_parts = 0;
    size_t wanted = 0;
    for (size_t i = 0; i < std::min(connection.out.size(), kMaxMessagesPerWrite); ++i) {
      Outgoing& out = connection.out[i];
      const size_t of_header = std::min(out.sent, sizeof(out.header));
      const size_t of_payload = out.sent - of_header;
      if (of_header < sizeof(out.header)) {
        parts[num_parts++] = {reinterpret_cast<char*>(&out.header) + of_header,
                              sizeof(out.header) - of_header};
      }
      if (of_payload < out.payload.size()) {
        parts[num_parts++] = {const_cast<std::byte*>(out.payload.data()) + of_payload,
                              out.payload.size() - of_payload};
      }
      wanted += sizeof(out.header) + out.payload.size() - out.sent;
    }
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = num_parts;
    const ssize_t sent = sendmsg(connection.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) Break(connection, std::strerror(errno));
      break;
    }
    auto left = static_cast<size_t>(sent);
    while (!connection.closed && !connection.out.empty()) {
      Outgoing& out = connection.out.front();
      const size_t rest = sizeof(out.header) + out.payload.size() - out.sent;
      if (left < rest) {
        out.sent += left;
        break;
      }
      left -= rest;
      const uint64_t cookie = out.cookie;
      connection.out.pop_front();
      if (cookie != 0) sink_->OnSent(cookie);
    }
    if (static_cast<size_t>(sent) < wanted) break;  // the socket is full
  }
  if (!connection.closed) Register(connection, !connection.out.empty() && !connection.broken);
}

void TcpLink::FinishConnect(Connection& connection) {
  int error = 0;
  socklen_t length = sizeof(error);
  (void)getsockopt(connection.fd, SOL_SOCKET, SO_ERROR, &error, &length);
  connection.connecting = false;
  if (error != 0) {
    Break(connection, std::strerror(error));
  } else {
    WatchForSilence(connection.fd);
    Write(connection);
  }
}

void TcpLink::DropIncoming(ConnectionId id) {
  if (Connection* connection = Find(id); connection != nullptr) connection->discards = true;
}

void TcpLink::Close(ConnectionId id) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  std::unique_ptr<Connection> connection = std::move(it->second);
  connections_.erase(it);
  connection->closed = true;
  close(connection->fd);
  const std::deque<Outgoing> out = std::move(connection->out);
  connection->out.clear();
  if (depth_ > 0) closed_.push_back(std::move(connection));
  for (const Outgoing& entry : out) {
    if (entry.cookie != 0) sink_->OnSent(entry.cookie);
  }
}

// Reads what is there, a few times.
void TcpLink::Read(Connection& connection) {
  for (int i = 0; i < kMaxReads && !connection.closed && !connection.broken; ++i) {
    // The buffer holds at most a part of a header here; a payload goes where it belongs.
    if (connection.begin > 0) {
      std::memmove(connection.buffer.data(), connection.buffer.data() + connection.begin,
                   connection.end - connection.begin);
      connection.end -= std::exchange(connection.begin, 0);
    }
    iovec parts[2];
    int num_parts = 0;
    size_t payload = 0;
    if (!connection.has_header) connection.payload_left = 0;
    if (connection.has_header) {
      payload = connection.payload_left;
      std::byte* to = connection.payload;
      if (connection.discards) {
        payload = std::min(payload, discard_.size());
        to = discard_.data();
      }
      parts[num_parts++] = {to, payload};
    }
    // Nothing may follow a payload of which only a part is asked for.
    if (payload == connection.payload_left) {
      parts[num_parts++] = {connection.buffer.data() + connection.end,
                            connection.buffer.size() - connection.end};
    }
    size_t wanted = 0;
    for (int part = 0; part < num_parts; ++part) wanted += parts[part].iov_len;
    const ssize_t got = readv(connection.fd, parts, num_parts);
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) Break(connection, std::strerror(errno));
      return;
    }
    if (got == 0) return Break(connection, "the other end closed the connection");
    const size_t of_payload = std::min(payload, static_cast<size_t>(got));
    connection.end += static_cast<size_t>(got) - of_payload;
    if (!connection.discards) connection.payload += of_payload;
    connection.payload_left -= of_payload;
    Parse(connection);
    if (static_cast<size_t>(got) < wanted) return;
  }
}

// Understands what was read, message by message.
void TcpLink::Parse(Connection& connection) {
  while (!connection.closed) {
    const size_t left = connection.end - connection.begin;
    const std::byte* data = connection.buffer.data() + connection.begin;
    if (!connection.has_header) {
      if (left < sizeof(WireHeader)) return;
      std::memcpy(&connection.header, data, sizeof(WireHeader));
      connection.begin += sizeof(WireHeader);
      if (!BeginMessage(connection)) return;
      continue;
    }
    const size_t size = std::min(left, connection.payload_left);
    if (size > 0 && !connection.discards) {
      std::memcpy(connection.payload, data, size);
      connection.payload += size;
    }
    connection.begin += size;
    connection.payload_left -= size;
    if (connection.payload_left > 0) return;
    EndMessage(connection);
  }
}

bool TcpLink::BeginMessage(Connection& connection) {
  const WireHeader& header = connection.header;
  if (!header.IsWellFormed()) {
    sink_->OnMalformed(connection.id);
    return false;
  }
  connection.has_header = true;
  connection.discards = false;
  connection.payload_left = header.payload;
  connection.payload = sink_->OnHeader(connection.id, header);
  if (connection.closed) return false;
  if (connection.payload == nullptr) {
    if (header.payload > kMaxSmallPayload && !connection.discards) {
      sink_->OnMalformed(connection.id);
      return false;
    }
    connection.payload = connection.small.data();
  }
  return true;
}

void TcpLink::EndMessage(Connection& connection) {
  connection.has_header = false;
  if (std::exchange(connection.discards, false)) return;
  const WireHeader header = connection.header;
  sink_->OnMessage(connection.id, header,
                   {connection.payload - header.payload, static_cast<size_t>(header.payload)});
}

void TcpLink::Dispatch(std::span<const epoll_event> events) {
  {
    Held held(depth_);
    for (const epoll_event& event : events) {
      if (event.data.u64 == kListener) {
        Accept();
        continue;
      }
      if (event.data.u64 == kWake) {
        uint64_t value = 0;
        (void)!read(wake_fd_, &value, sizeof(value));
        continue;
      }
      Connection* connection = Find(event.data.u64);
      if (connection == nullptr || connection->broken) continue;
      if (connection->connecting) {
        FinishConnect(*connection);
      } else if ((event.events & EPOLLOUT) != 0) {
        Write(*connection);
      }
      if ((event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0 && !connection->closed)
        Read(*connection);
    }
    Flush();
    for (const Broken& entry : std::exchange(broken_, {})) {
      Connection* connection = Find(entry.connection);
      if (connection != nullptr) sink_->OnBroken(entry.connection, entry.why);
    }
  }
  if (depth_ == 0) closed_.clear();
}

}  // namespace switchyard
