// NetworkGroup: what one rank has under way in one epoch, as a state machine without threads and
// sockets: groups of sends and receives, matching by tag, flow control, errors. The data plane owns
// it, calls it under its lock, and moves what it gives to its Wire.
//
// A message goes to its receiver at once while at most `eager_bytes` are under way to that peer,
// and is kept there if its receive is not posted yet. Otherwise a request goes first, and the bytes
// when the receive is posted. In both cases the send is complete when the receiver says that the
// bytes are in their buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/wire.h"

namespace switchyard {

class NetworkGroup {
 public:
  class Wire {
   public:
    virtual ~Wire() = default;
    // On the connection that this rank opened to the peer: kData, kRequest. `payload` belongs to
    // the caller of Start: OnSent(peer) follows exactly once, perhaps from within.
    virtual void SendMessage(int32_t peer, const WireHeader& header,
                             std::span<const std::byte> payload) = 0;
    // On the connection that the peer opened: kReady, kDone, kTooLarge.
    virtual void SendReply(int32_t peer, const WireHeader& header) = 0;
    // What the peer is sending goes to memory that is not ours any more.
    virtual void DropIncoming(int32_t peer) = 0;
    // A peer does not follow the protocol.
    virtual void CutOff(int32_t peer) = 0;
  };

  NetworkGroup(Wire* wire, uint64_t epoch, int32_t rank, int32_t size, size_t eager_bytes);

  absl::Status Post(std::span<const SendOp> sends, std::span<RecvOp> recvs);
  void EndGroup() { receiving_ = false; }  // Wait returned
  void OnConnected(int32_t peer);          // messages may be sent to it
  void OnSent(int32_t peer);
  // What a member sent, on either connection; whatever is wrong with it fails this rank. OnHeader
  // says where the payload of a kData message goes: valid until OnMessage or Wire::DropIncoming.
  std::byte* OnHeader(int32_t peer, const WireHeader& header);
  void OnMessage(int32_t peer, const WireHeader& header);
  void OnLost(int32_t peer, std::string why);
  // The first error stays. Nothing is read, matched or written any more.
  void Fail(const absl::Status& error);

  const absl::Status& error() const { return error_; }
  bool Done() const { return num_sends_ == 0 && posted_.empty(); }
  int32_t num_unread() const { return num_unread_; }  // payloads that OnSent is awaited for
  bool IsLost(int32_t peer) const { return At(peer).lost; }
  std::string LatePeers() const;

 private:
  struct OutMessage {
    uint64_t id = 0;
    MessageTag tag;
    std::span<const std::byte> data;
    bool eager = false;      // counted in eager_used
    bool cleared = false;    // bytes may go
    bool requested = false;  // the request went
    bool all_sent = false;
    size_t sent = 0;  // bytes handed to the wire
  };
  struct InMessage {
    uint64_t id = 0;
    MessageTag tag;
    size_t size = 0;
    size_t got = 0;  // bytes; pieces come in order
    bool requested = false;
    bool whole = false;             // all bytes came
    std::vector<std::byte> kept{};  // [size], when the first bytes came before the receive
    size_t incoming = 0;            // bytes of the piece that is being read
    RecvOp* recv = nullptr;         // matched
  };
  struct Peer {
    bool connected = false;
    bool lost = false;
    std::string lost_why;
    uint64_t next_id = 1;        // of the messages to it
    uint64_t last_id = 0;        // of the messages from it
    std::deque<OutMessage> out;  // not acknowledged yet
    size_t eager_used = 0;       // bytes of them that count
    int32_t unread = 0;          // payloads of them that the wire holds
    std::deque<InMessage> in;    // not complete, or not matched
    size_t kept_bytes = 0;       // of them
  };
  struct Posted {
    RecvOp* recv = nullptr;
    bool matched = false;
  };

  Peer& At(int32_t peer) { return peers_[static_cast<size_t>(peer)]; }
  const Peer& At(int32_t peer) const { return peers_[static_cast<size_t>(peer)]; }
  absl::Status CheckPeer(int32_t peer) const;
  absl::Status PostSend(const SendOp& send);
  absl::Status PostRecv(RecvOp& recv, std::span<const RecvOp> before);
  void MatchSelf();
  WireHeader HeaderTo(int32_t peer, WireType type) const;
  void Pump(int32_t peer);
  bool SendPiece(int32_t peer);
  std::byte* BeginPiece(int32_t peer, const WireHeader& header);
  void EndPiece(int32_t peer, const WireHeader& header);
  InMessage* FindOrAddIn(int32_t peer, const WireHeader& header);
  void OnReply(int32_t peer, const WireHeader& header);
  void TryMatch(int32_t peer, InMessage& in);
  void MoveKept(int32_t peer, InMessage& in);
  void TryComplete(int32_t peer, InMessage& in);
  void Unpost(const RecvOp* recv);
  absl::Status TooLarge(int32_t from, int32_t to, const MessageTag& tag, uint64_t size,
                        uint64_t capacity) const;
  void Malformed(int32_t peer, const std::string& what);

  Wire* const wire_;
  const uint64_t epoch_;
  const int32_t rank_;
  const size_t eager_bytes_;
  std::vector<Peer> peers_;  // [size]; the own entry holds sends to oneself in `out`
  absl::Status error_;
  std::vector<Posted> posted_;
  bool receiving_ = false;  // a group of receives was started and not waited for
  int32_t num_sends_ = 0;   // sum of out.size()
  int32_t num_unread_ = 0;  // sum of unread
  bool pumping_ = false;
};

}  // namespace switchyard
