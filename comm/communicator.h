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

  virtual ~Communicator() = default;
  virtual int32_t rank() const = 0;
  virtual int32_t size() const = 0;

  // Starts a group of sends and receives. Within a group the order does not matter and cannot
  // deadlock; messages to oneself are legal. At most one group of receives and kMaxPendingSends
  // sends to one peer may be under way. The spans (the arrays of operations and the buffers) must
  // stay valid and unchanged until Wait returned or Start failed.
  virtual absl::Status Start(std::span<const SendOp> sends, std::span<RecvOp> recvs) = 0;
  // Blocks until everything started is complete, an abort (its reason), a lost peer (kUnavailable,
  // names the rank), a message larger than its buffer (kOutOfRange at both ends, names both sizes)
  // or the deadline (kDeadlineExceeded, names the peers that are late). No buffer is touched after
  // it returned.
  virtual absl::Status Wait(std::chrono::steady_clock::time_point deadline) = 0;

  // Ends this rank's wait, and every later call, with `reason` (not OK). Any thread; the first
  // error stays.
  virtual void Abort(const absl::Status& reason) = 0;
};

// The communicators of `size` ranks in one process, one per rank.
std::vector<std::unique_ptr<Communicator>> MakeInProcessCommunicators(int32_t size);

}  // namespace switchyard
