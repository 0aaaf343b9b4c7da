// Communicator: moves packed buffers between the ranks of one epoch. It knows no text, no requests
// and no models. Ranks are dense: attention ranks and expert ranks share one numbering. One
// instance per rank, used by that rank's owner thread only; Abort may be called from any thread.
// Any error of Start or Wait is final: every later call fails with it and the instance can only be
// destroyed. Destroying an instance loses its rank: peers that wait for it, or turn to it later,
// get kUnavailable.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/thread_pool.h"

namespace switchyard {

enum class MessageKind : uint8_t { kCounts, kDispatch, kCombine, kWeights };

// Which message of a step this is. Two messages with one tag between one pair of ranks in one
// direction are a bug.
struct MessageTag {
  uint64_t step = 0;
  int32_t layer = 0;
  int32_t micro_batch = 0;
  MessageKind kind = MessageKind::kCounts;
  uint8_t part = 0;  // which of several of this kind between two ranks
  friend bool operator==(const MessageTag&, const MessageTag&) = default;
};
// For error messages: "step 5 layer 7 micro-batch 0 dispatch", "… weights part 4".
std::string TagName(const MessageTag& tag);

struct SendOp {
  int32_t peer = 0;
  MessageTag tag;
  std::span<const std::byte> data;  // may be empty; must stay unchanged until Wait returned
};

struct RecvOp {
  int32_t peer = 0;
  MessageTag tag;
  std::span<std::byte> buffer;  // capacity; a larger message is an error that names both sizes
  size_t received = 0;          // bytes, written when the group is done
};

class Communicator {
 public:
  static constexpr int kMaxPendingSends = 64;  // under way from one rank to one peer
  static constexpr int kNumGroups = 2;         // one per micro-batch

  virtual ~Communicator() = default;
  virtual int32_t rank() const = 0;
  virtual int32_t size() const = 0;

  // Adds sends and receives to a group. REQUIRES: 0 <= group < kNumGroups. The order within a group
  // and between groups does not matter and cannot deadlock; messages to oneself are legal. In each
  // group one call's receives may be under way, in all of them kMaxPendingSends sends to one peer.
  // Groups are this rank's alone: its peer may have the other end of a message in another one. The
  // spans (the arrays of operations and the buffers) must stay valid and unchanged until Wait for
  // their group returned or Start failed. NCCL's messages move only while their
  // rank is in Start or Wait, so a thread that serves several ranks needs one of the other kinds.
  virtual absl::Status Start(int32_t group, std::span<const SendOp> sends,
                             std::span<RecvOp> recvs) = 0;
  // Blocks until everything started in `group` is complete, or until an error of this rank, of
  // whichever group: an abort (its reason), a lost peer that any group waits for (kUnavailable,
  // names the rank), a message larger than its buffer (kOutOfRange at both ends, names both sizes)
  // or the deadline (kDeadlineExceeded, names the peers that `group` waits for). No buffer of the
  // group is touched after it returned, after an error no buffer at all.
  virtual absl::Status Wait(int32_t group, std::chrono::steady_clock::time_point deadline) = 0;

  // For whoever needs one group.
  absl::Status Start(std::span<const SendOp> sends, std::span<RecvOp> recvs) {
    return Start(0, sends, recvs);
  }
  absl::Status Wait(std::chrono::steady_clock::time_point deadline) { return Wait(0, deadline); }

  // Ends this rank's wait, and every later call, with `reason` (not OK). Any thread; the first
  // error stays.
  virtual void Abort(const absl::Status& reason) = 0;
  // For an owner that gives up for a reason of its own (not OK), on its thread: no buffer of it is
  // touched afterwards.
  void Quit(const absl::Status& reason) {
    Abort(reason);
    (void)Wait(0, std::chrono::steady_clock::time_point::min());  // returns the error
  }
};

// The communicators of `size` ranks in one process, one per rank. Their threads wait in `pool`,
// which must outlive them.
std::vector<std::unique_ptr<Communicator>> MakeInProcessCommunicators(int32_t size,
                                                                      ThreadPool* pool);

}  // namespace switchyard
