// TcpLink: connections between data planes, and the messages on them, over TCP. A message is a
// WireHeader and its payload. Bytes go from the caller's memory into the socket and from the socket
// into the sink's memory, without a copy between. Nothing blocks, and no byte from outside is
// trusted. Not thread-safe: its owner calls it under one lock, from whichever thread; only Wake()
// and waiting on epoll_fd() need no lock.
#pragma once

#include <sys/epoll.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/wire.h"

namespace switchyard {

class TcpLink {
 public:
  using ConnectionId = uint64_t;  // never reused, never 0

  // Called from within Dispatch(), OnSent also from Send(), Flush() and Close(). May call
  // everything but Dispatch().
  class Sink {
   public:
    virtual ~Sink() = default;
    virtual void OnAccepted(ConnectionId connection) = 0;
    // Where the payload goes, header.payload bytes; it must stay valid until OnMessage,
    // DropIncoming() or Close(). Null: a payload of at most kMaxSmallPayload bytes is kept here,
    // a larger one is malformed.
    virtual std::byte* OnHeader(ConnectionId connection, const WireHeader& header) = 0;
    virtual void OnMessage(ConnectionId connection, const WireHeader& header,
                           std::span<const std::byte> payload) = 0;
    // What came is no message. Close() is still to be called.
    virtual void OnMalformed(ConnectionId connection) = 0;
    // The other end is gone. Close() is still to be called.
    virtual void OnBroken(ConnectionId connection, const std::string& why) = 0;
    // A payload is not read any more. `cookie` is what Send was given, if not 0.
    virtual void OnSent(uint64_t cookie) = 0;
  };

  static constexpr size_t kMaxSmallPayload = 256;

  static absl::StatusOr<std::unique_ptr<TcpLink>> Create(const std::string& host, Sink* sink);
  TcpLink(const TcpLink&) = delete;
  TcpLink& operator=(const TcpLink&) = delete;
  ~TcpLink();

  const std::string& address() const { return address_; }  // "host:port"

  // Does not wait for the other end; what is sent before it answered is queued.
  absl::StatusOr<ConnectionId> Connect(const std::string& address);
  // Queues the message; Flush() or Dispatch() writes it. Sets header.payload. `payload` must stay
  // unchanged until OnSent(cookie); cookie 0: it is copied.
  void Send(ConnectionId connection, WireHeader header, std::span<const std::byte> payload,
            uint64_t cookie);
  // The rest of the payload that is under way is read and forgotten; OnMessage does not follow.
  void DropIncoming(ConnectionId connection);
  void Flush();  // writes what the sockets take
  // At once; what was not sent is dropped.
  void Close(ConnectionId connection);

  // To wait on; what it returns goes to Dispatch(). Never wait while has_news().
  int epoll_fd() const { return epoll_fd_; }
  bool has_news() const { return !broken_.empty(); }
  void Wake();  // any thread: ends one wait
  void Dispatch(std::span<const epoll_event> events);
  // After too many open files: accepts again. True when there is need to.
  bool accept_paused() const { return accept_paused_; }
  void ResumeAccept();
  void StopAccept();  // for good

 private:
  struct Outgoing {
    WireHeader header;
    std::span<const std::byte> payload;
    std::vector<std::byte> copy;  // of a small payload
    uint64_t cookie = 0;
    size_t sent = 0;  // bytes of header and payload
  };
  struct Connection {
    ConnectionId id = 0;
    int fd = -1;
    bool connecting = false;
    bool broken = false;
    bool closed = false;
    bool wants_out = false;  // registered for EPOLLOUT
    bool dirty = false;      // in dirty_
    std::deque<Outgoing> out;
    // The message that is being read.
    bool has_header = false;
    bool discards = false;
    WireHeader header;
    std::byte* payload = nullptr;  // where the next byte goes
    size_t payload_left = 0;
    std::array<std::byte, kMaxSmallPayload> small;
    // Read and not understood yet: [begin, end) of the buffer.
    size_t begin = 0;
    size_t end = 0;
    std::vector<std::byte> buffer;
  };

  explicit TcpLink(Sink* sink) : sink_(sink) {}
  absl::Status Open(const std::string& host);
  ConnectionId Add(int fd, bool connecting);  // 0: the system refused, and fd is closed
  Connection* Find(ConnectionId id);
  void Register(Connection& connection, bool wants_out);
  void Accept();
  void Break(Connection& connection, std::string why);
  void Write(Connection& connection);
  void FinishConnect(Connection& connection);
  void Read(Connection& connection);
  void Parse(Connection& connection);
  bool BeginMessage(Connection& connection);
  void EndMessage(Connection& connection);

  Sink* const sink_;
  std::string address_;
  int listen_fd_ = -1;
  int epoll_fd_ = -1;
  int wake_fd_ = -1;
  bool accept_paused_ = false;
  ConnectionId next_id_ = 1;
  std::unordered_map<ConnectionId, std::unique_ptr<Connection>> connections_;
  std::vector<std::unique_ptr<Connection>> closed_;  // freed when nobody can look at them
  struct Broken {
    ConnectionId connection = 0;
    std::string why;
  };
  std::vector<Broken> broken_;       // to be told by Dispatch()
  std::vector<ConnectionId> dirty_;  // with messages that nobody tried to write
  std::vector<std::byte> discard_;
  int depth_ = 0;  // of calls that may hold a Connection
};

}  // namespace switchyard
