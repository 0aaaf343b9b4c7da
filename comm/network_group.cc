#include "comm/network_group.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

constexpr size_t kPiece = WireHeader::kMaxPayload;
constexpr size_t kMaxPiecesOut = 8;      // handed to the wire for one peer
constexpr size_t kMaxReadyIn = 1 << 12;  // receives of one peer ahead of this rank's sends

}  // namespace

NetworkGroup::NetworkGroup(Wire* wire, uint64_t epoch, int32_t rank, int32_t size,
                           size_t eager_bytes)
    : wire_(wire),
      epoch_(epoch),
      rank_(rank),
      eager_bytes_(eager_bytes),
      peers_(static_cast<size_t>(size)) {}

absl::Status NetworkGroup::Post(int32_t group, std::span<const SendOp> sends,
                                std::span<RecvOp> recvs) {
  SY_CHECK(group >= 0 && group < Communicator::kNumGroups);
  if (!error_.ok()) return error_;
  if (!recvs.empty() && std::exchange(receiving_[static_cast<size_t>(group)], true)) {
    return absl::FailedPreconditionError(
        absl::StrCat("rank ", rank_, " already has receives of group ", group, " under way"));
  }
  for (size_t i = 0; i < recvs.size(); ++i) {
    absl::Status status = PostRecv(group, recvs[i], recvs.first(i));
    if (!status.ok()) return status;
  }
  for (const SendOp& send : sends) {
    if (absl::Status status = PostSend(group, send); !status.ok()) return status;
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

absl::Status NetworkGroup::PostSend(int32_t group, const SendOp& send) {
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
  OutMessage out{.tag = send.tag, .data = send.data, .group = group};
  const auto ready = std::ranges::find(peer.ready_in, send.tag, &Ready::tag);
  if (ready != peer.ready_in.end()) {
    // One that is too large waits for its receiver to say so.
    out.ready = ready->capacity >= send.data.size();
    out.refused = !out.ready;
    peer.ready_in.erase(ready);
  } else {
    out.counted = send.data.size() <= eager_bytes_ - peer.eager_used;
    if (out.counted) peer.eager_used += send.data.size();
  }
  peer.out.push_back(out);
  ++num_sends_[static_cast<size_t>(group)];
  return absl::OkStatus();
}

absl::Status NetworkGroup::PostRecv(int32_t group, RecvOp& recv, std::span<const RecvOp> before) {
  // A message that a peer sent before it was lost left with it.
  if (absl::Status status = CheckPeer(recv.peer); !status.ok()) return status;
  const auto same = [&](const RecvOp& other) {
    return other.peer == recv.peer && other.tag == recv.tag;
  };
  if (std::ranges::any_of(before, same) ||
      std::ranges::any_of(posted_, [&](const Posted& other) { return same(*other.recv); })) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", rank_, ": second receive from rank ",
                                                   recv.peer, " with the tag ", TagName(recv.tag)));
  }
  recv.received = 0;
  posted_.push_back({.recv = &recv, .group = group});
  if (recv.peer != rank_) SayReady(recv.peer, {recv.tag, recv.buffer.size()});
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
    if (out->counted) self.eager_used -= out->data.size();
    posted_.erase(posted);
    --num_sends_[static_cast<size_t>(out->group)];
    out = self.out.erase(out);
  }
}

WireHeader NetworkGroup::HeaderTo(int32_t peer, WireType type, const MessageTag& tag) const {
  WireHeader header;
  header.type = type;
  header.epoch = epoch_;
  header.from = rank_;
  header.to = peer;
  header.kind = tag.kind;
  header.part = tag.part;
  header.step = tag.step;
  header.layer = tag.layer;
  header.micro_batch = tag.micro_batch;
  return header;
}

void NetworkGroup::SayReady(int32_t rank, const Ready& ready) {
  if (!At(rank).connected) return At(rank).ready_out.push_back(ready);
  WireHeader header = HeaderTo(rank, WireType::kReady, ready.tag);
  header.size = ready.capacity;
  wire_->Send(rank, header, {});
}

void NetworkGroup::OnConnected(int32_t rank) {
  Peer& peer = At(rank);
  if (!error_.ok() || std::exchange(peer.connected, true)) return;
  for (const Ready& ready : std::exchange(peer.ready_out, {})) SayReady(rank, ready);
  Pump(rank);
}

// Hands the wire as much as it may hold for this peer. The wire may answer with OnWritten at once.
void NetworkGroup::Pump(int32_t peer) {
  if (pumping_) return;
  pumping_ = true;
  while (SendPiece(peer)) {
  }
  pumping_ = false;
  EndCompleteSends(peer);
}

bool NetworkGroup::SendPiece(int32_t rank) {
  Peer& peer = At(rank);
  if (!error_.ok() || !peer.connected || peer.lost || peer.pieces.size() >= kMaxPiecesOut)
    return false;
  for (OutMessage& out : peer.out) {
    const bool may_go = out.ready || out.refused || out.counted || out.begun;
    if (!may_go || (out.begun && out.handed == out.data.size())) continue;
    if (!out.begun) out.id = peer.next_id++;
    WireHeader header = HeaderTo(rank, WireType::kData, out.tag);
    header.message = out.id;
    header.size = out.data.size();
    header.offset = out.handed;
    const std::span<const std::byte> piece =
        out.data.subspan(out.handed, std::min(kPiece, out.data.size() - out.handed));
    out.begun = true;
    out.handed += piece.size();
    if (!piece.empty()) peer.pieces.push_back({out.id, piece.size()});
    wire_->Send(rank, header, piece);
    return true;
  }
  return false;
}

void NetworkGroup::OnWritten(int32_t rank) {
  Peer& peer = At(rank);
  const Piece piece = peer.pieces.front();
  peer.pieces.pop_front();
  const auto out = std::ranges::find(peer.out, piece.message, &OutMessage::id);
  if (out != peer.out.end()) out->written += piece.bytes;
  Pump(rank);
}

void NetworkGroup::EndCompleteSends(int32_t rank) {
  std::erase_if(At(rank).out, [&](const OutMessage& out) {
    if (!out.ready || !out.begun || out.written != out.data.size()) return false;
    --num_sends_[static_cast<size_t>(out.group)];
    return true;
  });
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
  if (header.type == WireType::kData) return EndPiece(peer, header);
  if (header.type == WireType::kReady) return OnReady(peer, header);
  if (header.type == WireType::kTooLarge) return OnTooLarge(peer, header);
  Malformed(peer, absl::StrCat("a message of type ", static_cast<int>(header.type)));
}

void NetworkGroup::OnReady(int32_t rank, const WireHeader& header) {
  Peer& peer = At(rank);
  const auto out = std::ranges::find_if(peer.out, [&](const OutMessage& o) {
    return !o.ready && !o.refused && o.tag == header.tag();
  });
  if (out == peer.out.end()) {
    if (peer.ready_in.size() >= kMaxReadyIn)
      return Malformed(rank, absl::StrCat("more than ", kMaxReadyIn, " receives ahead"));
    peer.ready_in.push_back({header.tag(), header.size});
    return;
  }
  if (std::exchange(out->counted, false)) peer.eager_used -= out->data.size();
  out->ready = header.size >= out->data.size();
  out->refused = !out->ready;  // its receiver says so when it sees it
  Pump(rank);
}

void NetworkGroup::OnTooLarge(int32_t rank, const WireHeader& header) {
  const bool is_mine = std::ranges::any_of(At(rank).out, [&](const OutMessage& o) {
    return o.tag == header.tag() && o.data.size() == header.size && header.offset < header.size;
  });
  if (!is_mine)
    return Malformed(rank, absl::StrCat("it refuses ", header.size, " bytes that never went"));
  Fail(TooLarge(rank_, rank, header.tag(), header.size, header.offset));
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
  if (header.message <= peer.last_id || header.offset != 0) {
    Malformed(rank, absl::StrCat("message ", header.message, " at ", header.offset, " after ",
                                 peer.last_id));
  } else if (std::ranges::count(peer.in, nullptr, &InMessage::recv) >=
             Communicator::kMaxPendingSends) {
    Malformed(rank, absl::StrCat("more than ", peer.in.size(), " messages under way"));
  } else if (std::ranges::any_of(peer.in,
                                 [&](const InMessage& m) { return m.tag == header.tag(); })) {
    Malformed(rank, absl::StrCat("two messages with the tag ", TagName(header.tag())));
  } else {
    peer.last_id = header.message;
    peer.in.push_back({.id = header.message, .tag = header.tag(), .size = header.size});
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
  if (in->whole) {
    Malformed(rank, absl::StrCat("bytes after the end of message ", in->id));
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

// Joins the message with its receive, if that is posted.
void NetworkGroup::TryMatch(int32_t rank, InMessage& in) {
  const auto posted = std::ranges::find_if(posted_, [&](const Posted& p) {
    return !p.matched && p.recv->peer == rank && p.recv->tag == in.tag;
  });
  if (posted == posted_.end()) return;
  RecvOp& recv = *posted->recv;
  if (in.size > recv.buffer.size()) {
    WireHeader answer = HeaderTo(rank, WireType::kTooLarge, in.tag);
    answer.size = in.size;
    answer.offset = recv.buffer.size();
    wire_->Send(rank, answer, {});
    Fail(TooLarge(rank, rank_, in.tag, in.size, recv.buffer.size()));
    return;
  }
  posted->matched = true;
  in.recv = &recv;
  // A piece that is being read into `kept` comes first.
  if (in.incoming == 0) MoveKept(rank, in);
  TryComplete(rank, in);
}

// Invalidates `in` when it is complete.
void NetworkGroup::TryComplete(int32_t rank, InMessage& in) {
  if (in.recv == nullptr || !in.whole) return;
  in.recv->received = in.size;
  std::erase_if(posted_, [&](const Posted& p) { return p.recv == in.recv; });
  std::erase_if(At(rank).in, [id = in.id](const InMessage& m) { return m.id == id; });
}

absl::Status NetworkGroup::TooLarge(int32_t from, int32_t to, const MessageTag& tag, uint64_t size,
                                    uint64_t capacity) {
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
  num_sends_.fill(0);
}

bool NetworkGroup::Done(int32_t group) const {
  return num_sends_[static_cast<size_t>(group)] == 0 &&
         std::ranges::find(posted_, group, &Posted::group) == posted_.end();
}

bool NetworkGroup::Idle() const {
  return posted_.empty() && std::ranges::all_of(num_sends_, [](auto n) { return n == 0; });
}

std::string NetworkGroup::LatePeers(int32_t group) const {
  std::vector<std::string> late;
  for (const Posted& posted : posted_) {
    if (posted.group != group) continue;
    late.push_back(
        absl::StrCat("rank ", posted.recv->peer, " (to send ", TagName(posted.recv->tag), ")"));
  }
  for (size_t peer = 0; peer < peers_.size(); ++peer) {
    const auto sends = std::ranges::count(peers_[peer].out, group, &OutMessage::group);
    if (sends > 0)
      late.push_back(absl::StrCat("rank ", peer, " (to receive ", sends, " messages)"));
  }
  return absl::StrCat("rank ", rank_, " waited too long for ", absl::StrJoin(late, ", "));
}

}  // namespace switchyard
