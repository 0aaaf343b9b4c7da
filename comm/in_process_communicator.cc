// The communicators of ranks that are threads of one process. A message is copied once, straight
// from the sender's buffer into the receiver's, by whichever of the two came second. All ranks
// share one Hub; its lock is never held during a copy.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "comm/communicator.h"
#include "kernels/check.h"
#include "kernels/mutex.h"

namespace switchyard {
namespace {

constexpr auto kNever = std::chrono::steady_clock::time_point::max();

// A send whose receive was not posted yet. Waits at the receiver.
struct WaitingSend {
  int32_t from = 0;
  int32_t group = 0;  // of its sender
  MessageTag tag;
  std::span<const std::byte> data;
};

// A receive whose message has not come yet.
struct PostedRecv {
  int32_t group = 0;
  RecvOp* recv = nullptr;
};

// A pair that met: copied outside the lock.
struct Copy {
  int32_t from = 0;
  int32_t from_group = 0;
  int32_t to = 0;
  int32_t to_group = 0;
  std::span<const std::byte> data;
  RecvOp* recv = nullptr;
};

struct Hub {
  // What one rank has under way in one of its groups.
  struct Group {
    std::vector<int32_t> sends_to;  // [size] sends that wait for a receive, per peer
    int32_t num_sends = 0;          // their sum
    int32_t num_posted = 0;         // receives that wait for a send
    int32_t num_copies = 0;         // running copies from or into its buffers

    bool Done() const { return num_sends == 0 && num_posted == 0 && num_copies == 0; }
  };
  struct Rank {
    bool alive = true;
    absl::Status error;              // the first one; final
    std::deque<WaitingSend> inbox;   // sends to this rank that wait for a receive
    std::vector<PostedRecv> posted;  // receives of this rank that wait for a send
    std::array<Group, Communicator::kNumGroups> groups;
    std::atomic<uint32_t> version = 0;  // raised when something above changed

    Group& Of(int32_t group) { return groups[static_cast<size_t>(group)]; }
    int32_t SendsTo(int32_t peer) const {
      int32_t sends = 0;
      for (const Group& group : groups) sends += group.sends_to[static_cast<size_t>(peer)];
      return sends;
    }
    bool Copies() const {
      return std::ranges::any_of(groups, [](const Group& g) { return g.num_copies > 0; });
    }
  };

  Hub(int32_t size, ThreadPool* owners) : pool(owners), ranks(static_cast<size_t>(size)) {
    for (Rank& rank : ranks) {
      for (Group& group : rank.groups) group.sends_to.assign(static_cast<size_t>(size), 0);
    }
  }

  Rank& At(int32_t rank) SY_REQUIRES(mu) { return ranks[static_cast<size_t>(rank)]; }

  void Fail(int32_t rank, const absl::Status& error) SY_REQUIRES(mu) {
    Rank& r = At(rank);
    if (r.error.ok()) r.error = error;
    r.version.fetch_add(1, std::memory_order_release);
    pool->Wake(&r);
  }

  // A send to `to` met its receive: both have left the queues. Too large a message fails both
  // ranks.
  void Match(int32_t to, const WaitingSend& send, const PostedRecv& posted,
             std::vector<Copy>* copies) SY_REQUIRES(mu) {
    const auto [from, from_group, tag, data] = send;
    RecvOp* const recv = posted.recv;
    Group& sender = At(from).Of(from_group);
    Group& receiver = At(to).Of(posted.group);
    --sender.sends_to[static_cast<size_t>(to)];
    --sender.num_sends;
    --receiver.num_posted;
    if (data.size() > recv->buffer.size()) {
      const absl::Status error = absl::OutOfRangeError(absl::StrCat(
          "message of ", data.size(), " bytes from rank ", from, " to rank ", to, " (",
          TagName(recv->tag), ") does not fit its buffer of ", recv->buffer.size(), " bytes"));
      Fail(from, error);
      Fail(to, error);
      return;
    }
    ++sender.num_copies;
    ++receiver.num_copies;
    copies->push_back({from, from_group, to, posted.group, data, recv});
  }

  // Takes back whatever of this rank is still waiting, so that nobody touches its buffers any more,
  // and waits for the copies that run. Those are bounded by their size.
  void Retract(int32_t rank) SY_REQUIRES(mu) {
    Rank& self = At(rank);
    self.posted.clear();
    for (int32_t peer = 0; peer < static_cast<int32_t>(ranks.size()); ++peer) {
      if (self.SendsTo(peer) == 0) continue;
      std::erase_if(At(peer).inbox, [&](const WaitingSend& send) { return send.from == rank; });
    }
    for (Group& group : self.groups) {
      std::ranges::fill(group.sends_to, 0);
      group.num_sends = 0;
      group.num_posted = 0;
    }
    while (self.Copies()) WaitForChange(self, kNever);
  }

  // Until something of this rank changes, or the deadline; false then.
  bool WaitForChange(Rank& self, std::chrono::steady_clock::time_point deadline) SY_REQUIRES(mu) {
    const uint32_t seen = self.version.load(std::memory_order_relaxed);
    mu.Unlock();
    const bool changed = pool->Await(
        &self, [&] { return self.version.load(std::memory_order_acquire) != seen; }, deadline);
    mu.Lock();
    return changed;
  }

  ThreadPool* const pool;
  Mutex mu;
  std::vector<Rank> ranks SY_GUARDED_BY(mu);  // except Rank::version
};

class InProcessCommunicator final : public Communicator {
 public:
  InProcessCommunicator(std::shared_ptr<Hub> hub, int32_t rank, int32_t size)
      : hub_(std::move(hub)), rank_(rank), size_(size) {}

  ~InProcessCommunicator() override {
    MutexLock lock(hub_->mu);
    hub_->Retract(rank_);
    Hub::Rank& self = hub_->At(rank_);
    self.alive = false;
    // Whoever has business with this rank will never finish it.
    for (const WaitingSend& send : self.inbox) FailLost(send.from);
    self.inbox.clear();
    for (int32_t peer = 0; peer < size_; ++peer) {
      const auto& posted = hub_->At(peer).posted;
      if (std::ranges::any_of(posted, [&](const PostedRecv& p) { return p.recv->peer == rank_; }))
        FailLost(peer);
    }
  }

  int32_t rank() const override { return rank_; }
  int32_t size() const override { return size_; }

  absl::Status Start(int32_t group, std::span<const SendOp> sends,
                     std::span<RecvOp> recvs) override {
    SY_CHECK(group >= 0 && group < kNumGroups);
    copies_.clear();
    {
      MutexLock lock(hub_->mu);
      const absl::Status& error = hub_->At(rank_).error;
      if (absl::Status status = error.ok() ? Post(group, sends, recvs) : error; !status.ok())
        hub_->Fail(rank_, status);
    }
    // Pairs that met are completed even if this call fails: the other end counts on them.
    for (const Copy& copy : copies_) {
      if (!copy.data.empty())
        std::memcpy(copy.recv->buffer.data(), copy.data.data(), copy.data.size());
      copy.recv->received = copy.data.size();
    }
    woken_.clear();
    absl::Status status = EndCopies();
    for (const Hub::Rank* rank : woken_) hub_->pool->Wake(rank);
    return status;
  }

  absl::Status Wait(int32_t index, std::chrono::steady_clock::time_point deadline) override {
    SY_CHECK(index >= 0 && index < kNumGroups);
    MutexLock lock(hub_->mu);
    Hub::Rank& self = hub_->At(rank_);
    const Hub::Group& group = self.Of(index);
    while (self.error.ok() && !group.Done()) {
      if (group.num_posted == 0 && group.num_sends == 0) {
        hub_->WaitForChange(self, kNever);  // only copies run: bounded by their size
      } else if (!hub_->WaitForChange(self, deadline) && self.error.ok() && !group.Done()) {
        const std::string late = LatePeers(index);
        if (!late.empty()) hub_->Fail(rank_, absl::DeadlineExceededError(late));
      }
    }
    if (!self.error.ok()) hub_->Retract(rank_);
    receiving_[static_cast<size_t>(index)] = false;
    return self.error;
  }

  void Abort(const absl::Status& reason) override {
    SY_CHECK(!reason.ok());
    MutexLock lock(hub_->mu);
    hub_->Fail(rank_, reason);
  }

 private:
  // Checks every operation, queues it or matches it with its other end.
  absl::Status Post(int32_t group, std::span<const SendOp> sends, std::span<RecvOp> recvs)
      SY_REQUIRES(hub_->mu) {
    Hub::Rank& self = hub_->At(rank_);
    if (!recvs.empty() && std::exchange(receiving_[static_cast<size_t>(group)], true)) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", rank_, " already has receives of group ", group, " under way"));
    }
    for (const SendOp& send : sends) {
      if (absl::Status status = CheckPeer(send.peer); !status.ok()) return status;
      const int32_t pending = self.SendsTo(send.peer);
      if (pending >= kMaxPendingSends) {
        return absl::ResourceExhaustedError(absl::StrCat("rank ", rank_, " has ", pending,
                                                         " sends to rank ", send.peer,
                                                         " under way, the limit"));
      }
      Hub::Rank& peer = hub_->At(send.peer);
      const auto same = [&](const WaitingSend& other) {
        return other.from == rank_ && other.tag == send.tag;
      };
      if (std::ranges::any_of(peer.inbox, same)) return Duplicate("send to", send.peer, send.tag);
      ++self.Of(group).sends_to[static_cast<size_t>(send.peer)];
      ++self.Of(group).num_sends;
      const WaitingSend waiting{rank_, group, send.tag, send.data};
      const auto posted = std::ranges::find_if(peer.posted, [&](const PostedRecv& p) {
        return p.recv->peer == rank_ && p.recv->tag == send.tag;
      });
      if (posted == peer.posted.end()) {
        peer.inbox.push_back(waiting);
      } else {
        const PostedRecv met = *posted;
        peer.posted.erase(posted);
        hub_->Match(send.peer, waiting, met, &copies_);
      }
    }
    for (RecvOp& recv : recvs) {
      // A message that a peer sent before it was lost left with it: its buffer is gone.
      if (absl::Status status = CheckPeer(recv.peer); !status.ok()) return status;
      const auto same = [&](const RecvOp& other) {
        return other.peer == recv.peer && other.tag == recv.tag;
      };
      if (std::any_of(recvs.data(), &recv, same) ||
          std::ranges::any_of(self.posted, [&](const PostedRecv& p) { return same(*p.recv); })) {
        return Duplicate("receive from", recv.peer, recv.tag);
      }
      recv.received = 0;
      ++self.Of(group).num_posted;
      const auto sent = std::ranges::find_if(self.inbox, [&](const WaitingSend& send) {
        return send.from == recv.peer && send.tag == recv.tag;
      });
      if (sent == self.inbox.end()) {
        self.posted.push_back({group, &recv});
      } else {
        const WaitingSend send = *sent;
        self.inbox.erase(sent);
        hub_->Match(rank_, send, {group, &recv}, &copies_);
      }
    }
    return self.error;
  }

  absl::Status CheckPeer(int32_t peer) const SY_REQUIRES(hub_->mu) {
    if (peer < 0 || peer >= size_) {
      return absl::InvalidArgumentError(
          absl::StrCat("rank ", rank_, " turns to rank ", peer, " of ", size_));
    }
    return hub_->At(peer).alive ? absl::OkStatus() : Lost(peer);
  }

  absl::Status Duplicate(const char* what, int32_t peer, const MessageTag& tag) const {
    return absl::InvalidArgumentError(absl::StrCat("rank ", rank_, ": second ", what, " rank ",
                                                   peer, " with the tag ", TagName(tag)));
  }

  static absl::Status Lost(int32_t rank) {
    return absl::UnavailableError(absl::StrCat("rank ", rank, " is lost"));
  }
  void FailLost(int32_t peer) SY_REQUIRES(hub_->mu) { hub_->Fail(peer, Lost(rank_)); }

  // Whoever has waited for them is to be woken without the lock: it would wait for that next.
  absl::Status EndCopies() {
    MutexLock lock(hub_->mu);
    for (const Copy& copy : copies_) {
      for (const auto& [rank, group] :
           {std::pair(copy.from, copy.from_group), std::pair(copy.to, copy.to_group)}) {
        Hub::Rank& r = hub_->At(rank);
        --r.Of(group).num_copies;
        if (!r.Of(group).Done() && r.error.ok()) continue;
        r.version.fetch_add(1, std::memory_order_release);
        if (rank != rank_) woken_.push_back(&r);
      }
    }
    Hub::Rank& self = hub_->At(rank_);
    if (!self.error.ok()) hub_->Retract(rank_);
    return self.error;
  }

  // Empty when nobody is late.
  std::string LatePeers(int32_t group) const SY_REQUIRES(hub_->mu) {
    Hub::Rank& self = hub_->At(rank_);
    std::vector<std::string> late;
    for (const PostedRecv& posted : self.posted) {
      if (posted.group != group) continue;
      const RecvOp& recv = *posted.recv;
      late.push_back(absl::StrCat("rank ", recv.peer, " (to send ", TagName(recv.tag), ")"));
    }
    for (int32_t peer = 0; peer < size_; ++peer) {
      const int32_t sends = self.Of(group).sends_to[static_cast<size_t>(peer)];
      if (sends > 0)
        late.push_back(absl::StrCat("rank ", peer, " (to receive ", sends, " messages)"));
    }
    if (late.empty()) return "";
    return absl::StrCat("rank ", rank_, " waited too long for ", absl::StrJoin(late, ", "));
  }

  const std::shared_ptr<Hub> hub_;
  const int32_t rank_;
  const int32_t size_;
  // Owner thread only.
  std::vector<Copy> copies_;                  // reused
  std::vector<const Hub::Rank*> woken_;       // reused
  std::array<bool, kNumGroups> receiving_{};  // receives were started and not waited for
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeInProcessCommunicators(int32_t size,
                                                                      ThreadPool* pool) {
  SY_CHECK_GT(size, 0);
  auto hub = std::make_shared<Hub>(size, pool);
  std::vector<std::unique_ptr<Communicator>> communicators;
  for (int32_t rank = 0; rank < size; ++rank) {
    communicators.push_back(std::make_unique<InProcessCommunicator>(hub, rank, size));
  }
  return communicators;
}

}  // namespace switchyard
