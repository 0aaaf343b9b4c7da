#include "comm/network_group.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace switchyard {
namespace {

constexpr size_t kPiece = WireHeader::kMaxPayload;
constexpr int32_t kMaxPiecesOut = 8;  // handed to the wire for one peer

}  // namespace

NetworkGroup::NetworkGroup(Wire* wire, uint64_t epoch, int32_t rank, int32_t size,
                           size_t eager_bytes)
    : wire_(wire),
      epoch_(epoch),
      rank_(rank),
      eager_bytes_(eager_bytes),
      peers_(static_cast<size_t>(size)) {}

absl::Status NetworkGroup::Post(std::span<const SendOp> sends, std::span<RecvOp> recvs) {
  if (!error_.ok()) return error_;
  if (!recvs.empty() && std::exchange(receiving_, true)) {
    return absl::FailedPreconditionError(
        absl::StrCat("rank ", rank_, " already has a group of receives under way"));
  }
  for (size_t i = 0; i < recvs.size(); ++i) {
    absl::Status status = PostRecv(recvs[i], recvs.first(i));
    if (!status.ok()) return status;
  }
  for (const SendOp& send : sends) {
    if (absl::Status status = PostSend(send); !status.ok()) return status;
  }
  for (int32_t peer = 0; peer < static_cast<int32_t>(peers_.size()); ++peer) {
    if (peer != rank_) Pump(peer);
  }
  MatchSelf();
  return error_;
}

absl::Status NetworkGroup::CheckPeer(int32_t peer) const {
  if (peer < 0 || peer >= static_cast<int32_t>(peers_.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", rank_, " turns to rank ", peer, " of ", peers_.size()));
  }
  if (!At(peer).lost) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("rank ", peer, " is lost: ", At(peer).lost_why));
}

absl::Status NetworkGroup::PostSend(const SendOp& send) {
  if (absl::Status status = CheckPeer(send.peer); !status.ok()) return status;
  Peer& peer = At(send.peer);
  if (peer.out.size() >= Communicator::kMaxPendingSends) {
    return absl::ResourceExhaustedError(absl::StrCat("rank ", rank_, " has ", peer.out.size(),
                                                     " sends to rank ", send.peer,
                                                     " under way, the limit"));
  }
  if (std::ranges::any_of(peer.out, [&](const OutMessage& o) { return o.tag == send.tag; })) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", rank_, ": second send to rank ",
                                                   send.peer, " with the tag ", TagName(send.tag)));
  }
  OutMessage out{.id = peer.next_id++, .tag = send.tag, .data = send.data};
  if (send.data.size() <= eager_bytes_ - peer.eager_used) {
    out.eager = out.cleared = true;
    peer.eager_used += send.data.size();
  }
  peer.out.push_back(out);
  ++num_sends_;
  return absl::OkStatus();
}

absl::Status NetworkGroup::PostRecv(RecvOp& recv, std::span<const RecvOp> before) {
  // A message that a peer sent before it was lost left with it.
  if (absl::Status status = CheckPeer(recv.peer); !status.ok()) return status;
  if (std::ranges::any_of(before, [&](const RecvOp& other) {
        return other.peer == recv.peer && other.tag == recv.tag;
      })) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", rank_, ": second receive from rank ",
                                                   recv.peer, " with the tag ", TagName(recv.tag)));
  }
  recv.received = 0;
  posted_.push_back({&recv, false});
  for (InMessage& in : At(recv.peer).in) {
    if (in.recv != nullptr || in.tag != recv.tag) continue;
    TryMatch(recv.peer, in);
    break;
  }
  return error_;
}

void NetworkGroup::MatchSelf() {
  Peer& self = At(rank_);
  for (auto out = self.out.begin(); out != self.out.end() && error_.ok();) {
    const auto posted = std::ranges::find_if(
        posted_, [&](const Posted& p) { return p.recv->peer == rank_ && p.recv->tag == out->tag; });
    if (posted == posted_.end()) {
      ++out;
      continue;
    }
    RecvOp& recv = *posted->recv;
    if (out->data.size() > recv.buffer.size()) {
      Fail(TooLarge(rank_, rank_, out->tag, out->data.size(), recv.buffer.size()));
      return;
    }
    if (!out->data.empty()) std::memcpy(recv.buffer.data(), out->data.data(), out->data.size());
    recv.received = out->data.size();
    if (out->eager) self.eager_used -= out->data.size();
    posted_.erase(posted);
    out = self.out.erase(out);
    --num_sends_;
  }
}

WireHeader NetworkGroup::HeaderTo(int32_t peer, WireType type) const {
  WireHeader header;
  header.type = type;
  header.epoch = epoch_;
  header.from = rank_;
  header.to = peer;
  return header;
}

void NetworkGroup::OnConnected(int32_t peer) {
  At(peer).connected = true;
  Pump(peer);
}

// Hands the wire as much as it may hold for this peer. The wire may answer with OnSent at once.
void NetworkGroup::Pump(int32_t peer) {
  if (pumping_) return;
  pumping_ = true;
  while (SendPiece(peer)) {
  }
  pumping_ = false;
}

bool NetworkGroup::SendPiece(int32_t rank) {
  Peer& peer = At(rank);
  if (!error_.ok() || !peer.connected || peer.lost || peer.unread >= kMaxPiecesOut) return false;
  for (OutMessage& out : peer.out) {
    if (out.all_sent || (!out.cleared && out.requested)) continue;
    WireHeader header = HeaderTo(rank, out.cleared ? WireType::kData : WireType::kRequest);
    header.kind = out.tag.kind;
    header.part = out.tag.part;
    header.step = out.tag.step;
    header.layer = out.tag.layer;
    header.micro_batch = out.tag.micro_batch;
    header.message = out.id;
    header.size = out.data.size();
    header.offset = out.sent;
    std::span<const std::byte> piece;
    if (out.cleared) {
      piece = out.data.subspan(out.sent, std::min(kPiece, out.data.size() - out.sent));
      out.sent += piece.size();
      out.all_sent = out.sent == out.data.size();
    } else {
      out.requested = true;
    }
    ++peer.unread;
    ++num_unread_;
    wire_->SendMessage(rank, header, piece);
    return true;
  }
  return false;
}

void NetworkGroup::OnSent(int32_t peer) {
  --At(peer).unread;
  --num_unread_;
  Pump(peer);
}

std::byte* NetworkGroup::OnHeader(int32_t peer, const WireHeader& header) {
  if (!error_.ok() || At(peer).lost) {
    wire_->DropIncoming(peer);
    return nullptr;
  }
  if (header.type == WireType::kData) return BeginPiece(peer, header);
  if (header.payload != 0) Malformed(peer, absl::StrCat(header.payload, " bytes too many"));
  return nullptr;
}

void NetworkGroup::OnMessage(int32_t peer, const WireHeader& header) {
  if (!error_.ok() || At(peer).lost) return;
  switch (header.type) {
    case WireType::kData:
      return EndPiece(peer, header);
    case WireType::kRequest: {
      const uint64_t last_id = At(peer).last_id;
      InMessage* in = FindOrAddIn(peer, header);
      if (in == nullptr) return;
      if (header.message <= last_id)
        return Malformed(peer, absl::StrCat("a second request for message ", in->id));
      return TryMatch(peer, *in);
    }
    default:
      return OnReply(peer, header);
  }
}

NetworkGroup::InMessage* NetworkGroup::FindOrAddIn(int32_t rank, const WireHeader& header) {
  Peer& peer = At(rank);
  const auto it =
      std::ranges::find_if(peer.in, [&](const InMessage& m) { return m.id == header.message; });
  if (it != peer.in.end()) {
    if (it->tag == header.tag() && it->size == header.size && it->got == header.offset) return &*it;
    Malformed(rank, absl::StrCat("a piece at ", header.offset, " of ", header.size, " bytes after ",
                                 it->got, " of ", it->size));
    return nullptr;
  }
  const bool requested = header.type == WireType::kRequest;
  if (header.message <= peer.last_id || header.offset != 0) {
    Malformed(rank, absl::StrCat("message ", header.message, " at ", header.offset, " after ",
                                 peer.last_id));
  } else if (peer.in.size() >= Communicator::kMaxPendingSends) {
    Malformed(rank, absl::StrCat("more than ", peer.in.size(), " messages under way"));
  } else if (!requested && header.size > eager_bytes_) {
    Malformed(rank,
              absl::StrCat(header.size, " bytes without a request, the limit is ", eager_bytes_));
  } else if (std::ranges::any_of(peer.in,
                                 [&](const InMessage& m) { return m.tag == header.tag(); })) {
    Malformed(rank, absl::StrCat("two messages with the tag ", TagName(header.tag())));
  } else {
    peer.last_id = header.message;
    peer.in.push_back(
        {.id = header.message, .tag = header.tag(), .size = header.size, .requested = requested});
    return &peer.in.back();
  }
  return nullptr;
}

std::byte* NetworkGroup::BeginPiece(int32_t rank, const WireHeader& header) {
  Peer& peer = At(rank);
  if (header.offset > header.size ||
      header.payload != std::min<uint64_t>(kPiece, header.size - header.offset)) {
    Malformed(rank, absl::StrCat("a piece of ", header.payload, " bytes at ", header.offset, " of ",
                                 header.size));
    return nullptr;
  }
  InMessage* in = FindOrAddIn(rank, header);
  if (in == nullptr) return nullptr;
  if (in->whole || (in->requested && in->recv == nullptr)) {
    Malformed(rank, absl::StrCat("bytes of message ", in->id, " that were not asked for"));
    return nullptr;
  }
  if (in->recv == nullptr) TryMatch(rank, *in);
  if (!error_.ok()) return nullptr;
  in->incoming = header.payload;
  if (in->recv != nullptr && in->kept.empty()) return in->recv->buffer.data() + in->got;
  if (in->kept.empty() && in->size > 0) {
    if (in->size > eager_bytes_ - peer.kept_bytes) {
      Malformed(rank, absl::StrCat("more than ", eager_bytes_,
                                   " bytes of messages that nobody asked for"));
      return nullptr;
    }
    in->kept.resize(in->size);
    peer.kept_bytes += in->size;
  }
  return in->kept.data() + in->got;
}

void NetworkGroup::EndPiece(int32_t rank, const WireHeader& header) {
  auto& messages = At(rank).in;
  const auto in =
      std::ranges::find_if(messages, [&](const InMessage& m) { return m.id == header.message; });
  if (in == messages.end()) return;
  in->got += std::exchange(in->incoming, 0);
  in->whole = in->got == in->size;
  if (in->recv != nullptr) MoveKept(rank, *in);
  TryComplete(rank, *in);
}

// Bytes that came before their receive go to its buffer.
void NetworkGroup::MoveKept(int32_t rank, InMessage& in) {
  if (in.kept.empty()) return;
  std::memcpy(in.recv->buffer.data(), in.kept.data(), in.got);
  At(rank).kept_bytes -= in.size;
  in.kept = {};
}

// Joins the message with its receive, if that is posted, and asks for its bytes if it must.
void NetworkGroup::TryMatch(int32_t rank, InMessage& in) {
  const auto posted = std::ranges::find_if(posted_, [&](const Posted& p) {
    return !p.matched && p.recv->peer == rank && p.recv->tag == in.tag;
  });
  if (posted == posted_.end()) return;
  RecvOp& recv = *posted->recv;
  WireHeader reply = HeaderTo(rank, WireType::kReady);
  reply.message = in.id;
  reply.size = in.size;
  reply.offset = recv.buffer.size();
  if (in.size > recv.buffer.size()) {
    reply.type = WireType::kTooLarge;
    wire_->SendReply(rank, reply);
    Fail(TooLarge(rank, rank_, in.tag, in.size, recv.buffer.size()));
    return;
  }
  posted->matched = true;
  in.recv = &recv;
  if (in.requested) {
    wire_->SendReply(rank, reply);
    return;
  }
  // A piece that is being read into `kept` comes first.
  if (in.incoming == 0) MoveKept(rank, in);
  TryComplete(rank, in);
}

// Invalidates `in` when it is complete.
void NetworkGroup::TryComplete(int32_t rank, InMessage& in) {
  if (in.recv == nullptr || !in.whole) return;
  in.recv->received = in.size;
  Unpost(in.recv);
  WireHeader reply = HeaderTo(rank, WireType::kDone);
  reply.message = in.id;
  reply.size = in.size;
  auto& messages = At(rank).in;
  messages.erase(std::ranges::find_if(messages, [&](const InMessage& m) { return &m == &in; }));
  wire_->SendReply(rank, reply);
}

void NetworkGroup::Unpost(const RecvOp* recv) {
  std::erase_if(posted_, [&](const Posted& p) { return p.recv == recv; });
}

void NetworkGroup::OnReply(int32_t rank, const WireHeader& header) {
  Peer& peer = At(rank);
  const auto out =
      std::ranges::find_if(peer.out, [&](const OutMessage& o) { return o.id == header.message; });
  if (out == peer.out.end() || header.size != out->data.size()) {
    return Malformed(
        rank, absl::StrCat("an answer to message ", header.message, " of ", header.size, " bytes"));
  }
  switch (header.type) {
    case WireType::kReady:
      if (!out->requested || out->cleared) break;
      out->cleared = true;
      return Pump(rank);
    case WireType::kDone:
      if (!out->all_sent) break;
      if (out->eager) peer.eager_used -= out->data.size();
      peer.out.erase(out);
      --num_sends_;
      return;
    case WireType::kTooLarge:
      if (header.offset >= header.size) break;
      return Fail(TooLarge(rank_, rank, out->tag, header.size, header.offset));
    default:
      break;
  }
  Malformed(rank, absl::StrCat("answer ", static_cast<int>(header.type), " to message ",
                               header.message, " out of turn"));
}

absl::Status NetworkGroup::TooLarge(int32_t from, int32_t to, const MessageTag& tag, uint64_t size,
                                    uint64_t capacity) const {
  return absl::OutOfRangeError(absl::StrCat("message of ", size, " bytes from rank ", from,
                                            " to rank ", to, " (", TagName(tag),
                                            ") does not fit its buffer of ", capacity, " bytes"));
}

void NetworkGroup::Malformed(int32_t peer, const std::string& what) {
  wire_->CutOff(peer);
  Fail(absl::DataLossError(absl::StrCat("rank ", peer, " breaks the protocol: ", what)));
}

void NetworkGroup::OnLost(int32_t rank, std::string why) {
  Peer& peer = At(rank);
  if (peer.lost) return;
  peer.lost = true;
  peer.lost_why = std::move(why);
  const bool awaited =
      std::ranges::any_of(posted_, [&](const Posted& posted) { return posted.recv->peer == rank; });
  wire_->DropIncoming(rank);
  peer.in.clear();
  if (awaited || !peer.out.empty()) Fail(CheckPeer(rank));
}

void NetworkGroup::Fail(const absl::Status& error) {
  if (!error_.ok()) return;
  error_ = error;
  posted_.clear();
  for (int32_t rank = 0; rank < static_cast<int32_t>(peers_.size()); ++rank) {
    if (rank != rank_) wire_->DropIncoming(rank);
    At(rank).out.clear();
    At(rank).in.clear();
  }
  num_sends_ = 0;
}

std::string NetworkGroup::LatePeers() const {
  std::vector<std::string> late;
  for (const Posted& posted : posted_) {
    late.push_back(
        absl::StrCat("rank ", posted.recv->peer, " (to send ", TagName(posted.recv->tag), ")"));
  }
  for (size_t peer = 0; peer < peers_.size(); ++peer) {
    const size_t sends = peers_[peer].out.size();
    if (sends > 0)
      late.push_back(absl::StrCat("rank ", peer, " (to receive ", sends, " messages)"));
  }
  return absl::StrCat("rank ", rank_, " waited too long for ", absl::StrJoin(late, ", "));
}

}  // namespace switchyard
