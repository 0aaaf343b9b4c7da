// NetworkGroup: what one rank has under way in one epoch, as a state machine without threads and
// sockets: groups of sends and receives, matching by tag, flow control, errors. The data plane owns
// it, calls it under its lock, and moves what it gives to its Wire.
//
// A receiver tells the sender of every receive it posts, with its capacity (kReady). A message goes
// at once if its kReady is there, or while at most `eager_bytes` without one are under way to that
// peer; the receiver keeps those until their receive is posted. A send is complete when its bytes
// are written and its kReady is there: then they have a place at the receiver, and only its loss
// can keep them from it. A message that is too large is sent all the same: its receiver finds out,
// fails and answers.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
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
    // Messages to one peer arrive in the order of these calls. `payload` belongs to the caller of
    // Start; when it is not empty, OnWritten(peer) follows once, perhaps from within.
    virtual void Send(int32_t peer, const WireHeader& header,
                      std::span<const std::byte> payload) = 0;
    // What the peer is sending goes to memory that is not ours any more.
    virtual void DropIncoming(int32_t peer) = 0;
    // A peer does not follow the protocol.
    virtual void CutOff(int32_t peer) = 0;
  };

  NetworkGroup(Wire* wire, uint64_t epoch, int32_t rank, int32_t size, size_t eager_bytes);

  absl::Status Post(int32_t group, std::span<const SendOp> sends, std::span<RecvOp> recvs);
  void EndGroup(int32_t group) { receiving_[static_cast<size_t>(group)] = false; }  // Wait returned
  void OnConnected(int32_t peer);  // it has joined the epoch; may be said again
  void OnWritten(int32_t peer);
  // What a member sent; whatever is wrong with it fails this rank. OnHeader says where the payload
  // of a kData message goes: valid until OnMessage or Wire::DropIncoming.
  std::byte* OnHeader(int32_t peer, const WireHeader& header);
  void OnMessage(int32_t peer, const WireHeader& header);
  void OnLost(int32_t peer, std::string why);
  // The first error stays. Nothing is read, matched or written any more.
  void Fail(const absl::Status& error);

  const absl::Status& error() const { return error_; }
  bool Done(int32_t group) const;
  bool Idle() const;                                                       // all groups are done
  bool IsWriting(int32_t peer) const { return !At(peer).pieces.empty(); }  // OnWritten is due
  std::string LatePeers(int32_t group) const;

 private:
  struct OutMessage {
    uint64_t id = 0;  // once begun
    MessageTag tag{};
    std::span<const std::byte> data{};
    int32_t group = 0;
    bool ready = false;    // its receive is posted, and large enough
    bool refused = false;  // its receive is posted, and too small
    bool counted = false;  // goes before that, within eager_bytes
    bool begun = false;
    size_t handed = 0;  // bytes the wire was given
    size_t written = 0;
  };
  struct InMessage {
    uint64_t id = 0;
    MessageTag tag;
    size_t size = 0;
    size_t got = 0;                 // bytes; pieces come in order
    size_t incoming = 0;            // bytes of the piece that is being read
    bool whole = false;             // all bytes came
    std::vector<std::byte> kept{};  // [size], when the first bytes came before the receive
    RecvOp* recv = nullptr;         // matched
  };
  struct Piece {  // a payload that the wire holds
    uint64_t message = 0;
    size_t bytes = 0;
  };
  struct Ready {
    MessageTag tag;
    uint64_t capacity = 0;
  };
  struct Peer {
    bool connected = false;
    bool lost = false;
    std::string lost_why;
    std::deque<Ready> ready_out;  // to be said when connected
    uint64_t next_id = 1;         // of the messages to it
    uint64_t last_id = 0;         // of the messages from it
    std::deque<OutMessage> out;   // not complete
    size_t eager_used = 0;        // bytes of them that went without kReady
    std::deque<Piece> pieces;     // of them; the wire writes in order
    std::deque<InMessage> in;     // not complete, or not matched
    size_t kept_bytes = 0;        // of them
    std::deque<Ready> ready_in;   // receives that the peer posted and this rank has no send for
  };
  struct Posted {
    RecvOp* recv = nullptr;
    int32_t group = 0;
    bool matched = false;
  };

  Peer& At(int32_t peer) { return peers_[static_cast<size_t>(peer)]; }
  const Peer& At(int32_t peer) const { return peers_[static_cast<size_t>(peer)]; }
  absl::Status CheckPeer(int32_t peer) const;
  absl::Status PostSend(int32_t group, const SendOp& send);
  absl::Status PostRecv(int32_t group, RecvOp& recv, std::span<const RecvOp> before);
  void MatchSelf();
  WireHeader HeaderTo(int32_t peer, WireType type, const MessageTag& tag) const;
  void Pump(int32_t peer);
  bool SendPiece(int32_t peer);
  void SayReady(int32_t peer, const Ready& ready);
  void EndCompleteSends(int32_t peer);
  void OnReady(int32_t peer, const WireHeader& header);
  void OnTooLarge(int32_t peer, const WireHeader& header);
  std::byte* BeginPiece(int32_t peer, const WireHeader& header);
  void EndPiece(int32_t peer, const WireHeader& header);
  InMessage* FindOrAddIn(int32_t peer, const WireHeader& header);
  void TryMatch(int32_t peer, InMessage& in);
  void MoveKept(int32_t peer, InMessage& in);
  void TryComplete(int32_t peer, InMessage& in);
  static absl::Status TooLarge(int32_t from, int32_t to, const MessageTag& tag, uint64_t size,
                               uint64_t capacity);
  void Malformed(int32_t peer, const std::string& what);

  Wire* const wire_;
  const uint64_t epoch_;
  const int32_t rank_;
  const size_t eager_bytes_;
  std::vector<Peer> peers_;  // [size]; the own entry holds sends to oneself in `out`
  absl::Status error_;
  std::vector<Posted> posted_;
  // Per group.
  std::array<bool, Communicator::kNumGroups> receiving_{};     // receives were not waited for
  std::array<int32_t, Communicator::kNumGroups> num_sends_{};  // in all `out`
  bool pumping_ = false;
};

}  // namespace switchyard
