#include "comm/nccl_communicator.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "comm/nccl_link.h"
#include "kernels/check.h"
#include "kernels/mutex.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

// Polling: short at first, for messages that are nearly there, then so that no core burns.
constexpr std::chrono::microseconds kMinPause(10);
constexpr std::chrono::microseconds kMaxPause(500);
// CUDA's default number of hardware queues. Streams that share one may wait for each other, and a
// stream that waits for a peer may wait for ever.
constexpr int32_t kDefaultConnections = 8;

// REQUIRES: a checked header.
MessageTag TagOf(const NcclHeader& header) {
  return {header.step, header.layer, header.micro_batch, static_cast<MessageKind>(header.kind),
          static_cast<uint8_t>(header.part)};
}

class NcclCommunicator final : public Communicator {
 public:
  explicit NcclCommunicator(const NcclOptions& options)
      : options_(options), sends_(Size()), inbox_(Size()) {}

  ~NcclCommunicator() override {
    Close();
    out_.clear();
    in_.clear();
    if (root_ != nullptr) (void)ncclCommAbort(root_);
  }

  int32_t rank() const override { return options_.rank; }
  int32_t size() const override { return options_.size; }

  // Collective. Connects every pair too, so that no later call waits for a peer's host.
  absl::Status Connect() {
    absl::Status status = CudaStatus(cudaSetDevice(options_.device), "device");
    if (!status.ok()) return status;
    for (size_t peer = 0; peer < Size(); ++peer) {
      out_.push_back(std::make_unique<NcclLink>(/*sends=*/true, options_.max_message_bytes));
      in_.push_back(std::make_unique<NcclLink>(/*sends=*/false, options_.max_message_bytes));
    }
    for (NcclLink* link : Links()) {
      if (status = link->Allocate(); !status.ok()) return status;
    }
    ncclUniqueId id;
    static_assert(sizeof(id) == sizeof(NcclUniqueId));
    std::memcpy(&id, options_.unique_id.data(), sizeof(id));
    ncclConfig_t config = NonBlockingConfig();
    status = NcclStatus(ncclCommInitRankConfig(&root_, size(), id, rank(), &config), "rank");
    if (status.ok()) status = AwaitReady(root_, "rank");
    // In round r the ranks a and b with a + b = r (mod size) pair up: every pair, once. The lower
    // rank sends in the first of the pair's communicators, the other in the second.
    for (int32_t round = 0; round < size() && status.ok(); ++round) {
      const int32_t peer = (round - rank() + size()) % size();
      status = Split(peer, /*lower_sends=*/1);
      if (status.ok()) status = Split(peer, /*lower_sends=*/0);
    }
    for (NcclLink* link : Links()) {
      if (status.ok()) status = link->Launch(NcclLink::Phase::kHeader, sizeof(NcclHeader));
    }
    if (status.ok()) {
      status = Await([&]() -> absl::StatusOr<bool> {
        bool all = true;
        for (NcclLink* link : Links()) {
          const absl::StatusOr<bool> done = link->Done();
          if (!done.ok()) return done;
          all = all && *done;
        }
        return all;
      });
    }
    for (NcclLink* link : Links()) link->phase = NcclLink::Phase::kIdle;
    return status;
  }

  absl::Status Start(int32_t group, std::span<const SendOp> sends,
                     std::span<RecvOp> recvs) override {
    SY_CHECK(group >= 0 && group < kNumGroups);
    absl::Status status = Error();
    if (status.ok()) status = Post(group, sends, recvs);
    if (status.ok()) status = Progress();
    return Finish(status);
  }

  absl::Status Wait(int32_t group, Clock::time_point deadline) override {
    SY_CHECK(group >= 0 && group < kNumGroups);
    auto pause = kMinPause;
    absl::Status status = Error();
    while (status.ok()) {
      status = Progress();
      if (!status.ok() || Done(group)) break;
      if (Clock::now() >= deadline) {
        status = absl::DeadlineExceededError(LatePeers(group));
      } else {
        std::this_thread::sleep_for(pause);
        pause = std::min(2 * pause, kMaxPause);
        status = Error();
      }
    }
    receiving_[static_cast<size_t>(group)] = false;
    return Finish(status);
  }

  void Abort(const absl::Status& reason) override {
    SY_CHECK(!reason.ok());
    MutexLock lock(mu_);
    if (error_.ok()) error_ = reason;
  }

 private:
  struct Send {
    int32_t group = 0;
    SendOp op;
  };
  struct Posted {
    int32_t group = 0;
    RecvOp* recv = nullptr;
  };

  size_t Size() const { return static_cast<size_t>(options_.size); }
  NcclLink* Out(int32_t peer) { return out_[static_cast<size_t>(peer)].get(); }
  NcclLink* In(int32_t peer) { return in_[static_cast<size_t>(peer)].get(); }
  std::vector<NcclLink*> Links() const {  // to and from the other ranks
    std::vector<NcclLink*> links;
    for (size_t peer = 0; peer < out_.size(); ++peer) {
      if (static_cast<int32_t>(peer) == rank()) continue;
      links.push_back(out_[peer].get());
      links.push_back(in_[peer].get());
    }
    return links;
  }
  std::deque<Send>& Sends(int32_t peer) { return sends_[static_cast<size_t>(peer)]; }

  absl::Status Error() {
    MutexLock lock(mu_);
    return error_;
  }

  // Makes `status` this rank's error if it is one and the first; returns the first.
  absl::Status Finish(absl::Status status) {
    {
      MutexLock lock(mu_);
      if (error_.ok()) error_ = status;
      status = error_;
    }
    if (!status.ok()) Close();
    return status;
  }

  // Forgets all operations and ends the kernels that wait for them. No peer can finish anything
  // with this rank any more.
  void Close() {
    options_.liveness->MarkLost(rank());
    (void)cudaSetDevice(options_.device);
    for (NcclLink* link : Links()) link->Abort();
    for (auto& queue : sends_) queue.clear();
    posted_.clear();
  }

  absl::Status Await(const std::function<absl::StatusOr<bool>()>& is_done) {
    while (true) {
      const absl::StatusOr<bool> done = is_done();
      if (!done.ok() || *done) return done.status();
      if (Clock::now() >= options_.deadline) {
        return absl::DeadlineExceededError(
            absl::StrCat("rank ", rank(), ": not all of ", size(), " ranks connected in time"));
      }
      std::this_thread::sleep_for(kMaxPause);
    }
  }
  absl::Status AwaitReady(ncclComm_t comm, const char* what) {
    return Await([&] { return IsReady(comm, what); });
  }

  absl::Status Split(int32_t peer, int lower_sends) {
    const bool sends = (rank() < peer) == (lower_sends == 1);
    ncclConfig_t config = NonBlockingConfig();
    const int color = peer == rank() ? NCCL_SPLIT_NOCOLOR : std::min(rank(), peer);
    ncclComm_t* comm = sends ? &Out(peer)->comm : &In(peer)->comm;
    absl::Status status =
        NcclStatus(ncclCommSplit(root_, color, sends ? 0 : 1, comm, &config), "pair of ranks");
    if (status.ok()) status = AwaitReady(root_, "pair of ranks");
    if (status.ok() && *comm != nullptr) status = AwaitReady(*comm, "pair of ranks");
    return status;
  }

  absl::Status CheckPeer(int32_t peer) const {
    if (peer < 0 || peer >= size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("rank ", rank(), " turns to rank ", peer, " of ", size()));
    }
    return options_.liveness->IsLost(peer) ? Lost(peer) : absl::OkStatus();
  }
  static absl::Status Lost(int32_t peer) {
    return absl::UnavailableError(absl::StrCat("rank ", peer, " is lost"));
  }
  absl::Status Duplicate(const char* what, int32_t peer, const MessageTag& tag) const {
    return absl::InvalidArgumentError(absl::StrCat("rank ", rank(), ": second ", what, " rank ",
                                                   peer, " with the tag ", TagName(tag)));
  }

  // Checks every operation and queues it; a receive whose message is here already is done.
  absl::Status Post(int32_t group, std::span<const SendOp> sends, std::span<RecvOp> recvs) {
    if (!recvs.empty() && std::exchange(receiving_[static_cast<size_t>(group)], true)) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", rank(), " already has receives of group ", group, " under way"));
    }
    for (const SendOp& send : sends) {
      if (absl::Status status = CheckPeer(send.peer); !status.ok()) return status;
      std::deque<Send>& queue = Sends(send.peer);
      if (queue.size() >= kMaxPendingSends) {
        return absl::ResourceExhaustedError(absl::StrCat("rank ", rank(), " has ", queue.size(),
                                                         " sends to rank ", send.peer,
                                                         " under way, the limit"));
      }
      if (send.data.size() > options_.max_message_bytes) {
        return absl::OutOfRangeError(absl::StrCat("message of ", send.data.size(),
                                                  " bytes to rank ", send.peer, ": the limit is ",
                                                  options_.max_message_bytes));
      }
      if (std::ranges::any_of(queue, [&](const Send& o) { return o.op.tag == send.tag; }))
        return Duplicate("send to", send.peer, send.tag);
      queue.push_back({group, send});
    }
    for (RecvOp& recv : recvs) {
      if (absl::Status status = CheckPeer(recv.peer); !status.ok()) return status;
      const auto same = [&](const RecvOp& o) { return o.peer == recv.peer && o.tag == recv.tag; };
      if (std::any_of(recvs.data(), &recv, same) ||
          std::ranges::any_of(posted_, [&](const Posted& p) { return same(*p.recv); })) {
        return Duplicate("receive from", recv.peer, recv.tag);
      }
      recv.received = 0;
      posted_.push_back({group, &recv});
      auto& inbox = inbox_[static_cast<size_t>(recv.peer)];
      const auto kept =
          std::ranges::find_if(inbox, [&](const Message& m) { return m.tag == recv.tag; });
      if (kept == inbox.end()) continue;
      const Message message = std::move(*kept);
      inbox.erase(kept);
      if (absl::Status status = Deliver(recv.peer, message.tag, message.data); !status.ok())
        return status;
    }
    return absl::OkStatus();
  }

  bool Wanted(int32_t peer) const {
    return std::ranges::any_of(posted_, [&](const Posted& p) { return p.recv->peer == peer; });
  }
  auto FindPosted(int32_t peer, const MessageTag& tag) {
    return std::ranges::find_if(
        posted_, [&](const Posted& p) { return p.recv->peer == peer && p.recv->tag == tag; });
  }
  bool Done(int32_t group) const {
    const auto has = [group](auto& queue) {
      return std::ranges::any_of(queue, [group](auto& entry) { return entry.group == group; });
    };
    return !has(posted_) && std::ranges::none_of(sends_, has);
  }

  absl::Status CheckFits(const RecvOp& recv, size_t size) const {
    if (size <= recv.buffer.size()) return absl::OkStatus();
    return absl::OutOfRangeError(absl::StrCat(
        "message of ", size, " bytes from rank ", recv.peer, " to rank ", rank(), " (",
        TagName(recv.tag), ") does not fit its buffer of ", recv.buffer.size(), " bytes"));
  }

  // Copies a message into the receive that waits for it, or keeps it.
  absl::Status Deliver(int32_t peer, const MessageTag& tag, std::span<const std::byte> data) {
    const auto posted = FindPosted(peer, tag);
    if (posted == posted_.end()) {
      auto& inbox = inbox_[static_cast<size_t>(peer)];
      if (inbox.size() >= kMaxPendingSends) {
        return absl::ResourceExhaustedError(absl::StrCat("rank ", peer, " has sent ", inbox.size(),
                                                         " messages that no receive waits for"));
      }
      inbox.push_back({tag, {data.begin(), data.end()}});
      return absl::OkStatus();
    }
    RecvOp& recv = *posted->recv;
    if (absl::Status status = CheckFits(recv, data.size()); !status.ok()) return status;
    std::ranges::copy(data, recv.buffer.begin());
    recv.received = data.size();
    posted_.erase(posted);
    return absl::OkStatus();
  }

  // Does whatever can be done without waiting.
  absl::Status Progress() {
    absl::Status status = CudaStatus(cudaSetDevice(options_.device), "device");
    for (int32_t peer = 0; peer < size() && status.ok(); ++peer) {
      if (peer == rank()) {
        status = ProgressSelf();
      } else if (options_.liveness->IsLost(peer) && (!Sends(peer).empty() || Wanted(peer))) {
        status = Lost(peer);
      } else {
        status = ProgressSends(*Out(peer), Sends(peer));
        if (status.ok()) status = ProgressReceives(peer, *In(peer));
      }
    }
    return status;
  }

  absl::Status ProgressSelf() {
    std::deque<Send>& queue = Sends(rank());
    for (size_t i = 0; i < queue.size();) {
      const SendOp& send = queue[i].op;
      if (FindPosted(rank(), send.tag) == posted_.end()) {
        ++i;
        continue;
      }
      if (absl::Status status = Deliver(rank(), send.tag, send.data); !status.ok()) return status;
      queue.erase(queue.begin() + static_cast<ptrdiff_t>(i));
    }
    return absl::OkStatus();
  }

  absl::Status ProgressSends(NcclLink& link, std::deque<Send>& queue) {
    while (!queue.empty()) {
      const SendOp& send = queue.front().op;
      if (link.phase == NcclLink::Phase::kIdle) {
        const NcclHeader header{send.data.size(),
                                send.tag.step,
                                send.tag.layer,
                                send.tag.micro_batch,
                                static_cast<uint32_t>(send.tag.kind),
                                send.tag.part};
        std::memcpy(link.buffer(), &header, sizeof(header));
        absl::Status status = link.Launch(NcclLink::Phase::kHeader, sizeof(header));
        if (!status.ok()) return status;
      }
      const absl::StatusOr<bool> done = link.Done();
      if (!done.ok() || !*done) return done.status();
      if (link.phase == NcclLink::Phase::kHeader && !send.data.empty()) {
        std::ranges::copy(send.data, link.buffer());
        absl::Status status = link.Launch(NcclLink::Phase::kPayload, send.data.size());
        if (!status.ok()) return status;
        continue;
      }
      link.phase = NcclLink::Phase::kIdle;
      queue.pop_front();
    }
    return absl::OkStatus();
  }

  absl::Status ProgressReceives(int32_t peer, NcclLink& link) {
    while (link.phase != NcclLink::Phase::kIdle || Wanted(peer)) {
      absl::Status status;
      if (link.phase == NcclLink::Phase::kIdle)
        status = link.Launch(NcclLink::Phase::kHeader, sizeof(NcclHeader));
      if (!status.ok()) return status;
      const absl::StatusOr<bool> done = link.Done();
      if (!done.ok() || !*done) return done.status();
      if (link.phase == NcclLink::Phase::kHeader) {
        std::memcpy(&link.header, link.buffer(), sizeof(NcclHeader));
        if (link.header.size > options_.max_message_bytes ||
            link.header.kind > static_cast<uint64_t>(MessageKind::kWeights)) {
          return absl::DataLossError(absl::StrCat(
              "rank ", peer, " announces ", link.header.size, " bytes of kind ", link.header.kind,
              "; the limit is ", options_.max_message_bytes, " bytes"));
        }
        // Before the payload is taken: a sender that got it all may be first with its news.
        const auto posted = FindPosted(peer, TagOf(link.header));
        if (posted != posted_.end()) status = CheckFits(*posted->recv, link.header.size);
        if (!status.ok()) return status;
        if (link.header.size > 0) {
          status = link.Launch(NcclLink::Phase::kPayload, link.header.size);
          if (!status.ok()) return status;
          continue;
        }
      }
      link.phase = NcclLink::Phase::kIdle;
      status = Deliver(peer, TagOf(link.header), {link.buffer(), link.header.size});
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  std::string LatePeers(int32_t group) const {
    std::vector<std::string> late;
    for (const auto& [of, recv] : posted_) {
      if (of != group) continue;
      late.push_back(absl::StrCat("rank ", recv->peer, " (to send ", TagName(recv->tag), ")"));
    }
    for (int32_t peer = 0; peer < size(); ++peer) {
      const auto sends = std::ranges::count(sends_[static_cast<size_t>(peer)], group, &Send::group);
      if (sends > 0)
        late.push_back(absl::StrCat("rank ", peer, " (to receive ", sends, " messages)"));
    }
    return absl::StrCat("rank ", rank(), " waited too long for ", absl::StrJoin(late, ", "));
  }

  struct Message {
    MessageTag tag;
    std::vector<std::byte> data;
  };

  // Constant after Connect.
  const NcclOptions options_;
  ncclComm_t root_ = nullptr;                   // all ranks; the pairs are split from it
  std::vector<std::unique_ptr<NcclLink>> out_;  // [size], own rank's unused
  std::vector<std::unique_ptr<NcclLink>> in_;   // [size], own rank's unused
  // Owner thread only.
  std::vector<std::deque<Send>> sends_;     // [size], under way, oldest first
  std::vector<Posted> posted_;              // receives that wait for their message
  std::vector<std::deque<Message>> inbox_;  // [size], arrived before their receive
  std::array<bool, kNumGroups> receiving_{};

  Mutex mu_;
  absl::Status error_ SY_GUARDED_BY(mu_);  // the first one; final
};

absl::Status Check(const NcclOptions& options) {
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", options.rank, " of ", options.size, " ranks"));
  }
  if (options.liveness == nullptr || options.liveness->size() != options.size)
    return absl::InvalidArgumentError(absl::StrCat("liveness is not of ", options.size, " ranks"));
  int32_t connections = kDefaultConnections;
  const char* text = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  if (text != nullptr && !absl::SimpleAtoi(text, &connections)) {
    return absl::InvalidArgumentError(
        absl::StrCat("CUDA_DEVICE_MAX_CONNECTIONS is '", text, "', not a number"));
  }
  if (const int32_t streams = 2 * (options.size - 1); streams > connections) {
    return absl::FailedPreconditionError(absl::StrCat(
        options.size, " ranks need ", streams, " hardware queues per device, there are ",
        connections, ": raise CUDA_DEVICE_MAX_CONNECTIONS (at most 32)"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<NcclUniqueId> NewNcclUniqueId() {
  ncclUniqueId id;
  if (absl::Status status = NcclStatus(ncclGetUniqueId(&id), "unique id"); !status.ok())
    return status;
  NcclUniqueId bytes;
  std::memcpy(bytes.data(), &id, sizeof(id));
  return bytes;
}

absl::StatusOr<std::unique_ptr<Communicator>> MakeNcclCommunicator(const NcclOptions& options) {
  if (absl::Status status = Check(options); !status.ok()) return status;
  auto communicator = std::make_unique<NcclCommunicator>(options);
  if (absl::Status status = communicator->Connect(); !status.ok()) return status;
  return communicator;
}

}  // namespace switchyard
