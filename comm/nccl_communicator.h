// Communicators over NCCL: one rank per CUDA device, in one process or several. Made collectively:
// every rank calls MakeNcclCommunicator with the same id, each from a thread of its own. The made
// instance has the threads of communicator.h. Only the cuda preset builds this.
//
// A message travels as a header (tag and size), then its bytes, staged through pinned and device
// memory that is allocated once. Each directed pair of ranks has an NCCL communicator and a stream
// of its own: NCCL runs the operations of one communicator in order, and so a peer that is late
// holds up nobody else, and an abort ends only what its rank takes part in. NCCL also matches by
// order, not by tag: what arrives before its receive is posted is kept, at most kMaxPendingSends
// messages per peer.
//
// Where this is weaker than the contract: messages move only while their ranks are in Start or
// Wait; a send may complete before its receive is posted; a rank with an error is lost to its
// peers at once, so that the sender of a message too large for its buffer gets kUnavailable; and
// NCCL does not notice a lost peer, RankLiveness is told.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"

namespace switchyard {

// Which ranks of an epoch are lost, as far as this process knows. Any thread. A communicator marks
// its own rank when it fails or is destroyed; of other processes' ranks the control plane knows.
class RankLiveness {
 public:
  explicit RankLiveness(int32_t size) : lost_(static_cast<size_t>(size)) {}
  void MarkLost(int32_t rank) { lost_[static_cast<size_t>(rank)].store(true); }
  bool IsLost(int32_t rank) const { return lost_[static_cast<size_t>(rank)].load(); }
  int32_t size() const { return static_cast<int32_t>(lost_.size()); }

 private:
  std::vector<std::atomic<bool>> lost_;  // [size]
};

using NcclUniqueId = std::array<std::byte, 128>;

struct NcclOptions {
  NcclUniqueId unique_id{};  // of the epoch: from NewNcclUniqueId, called by one of its ranks
  int32_t rank = 0;
  int32_t size = 1;
  int32_t device = 0;            // CUDA ordinal; NCCL wants another device for every rank
  size_t max_message_bytes = 0;  // the same at all ranks; 4 (size - 1) buffers of this are held
  std::shared_ptr<RankLiveness> liveness;          // of `size` ranks
  std::chrono::steady_clock::time_point deadline;  // of the making; other ranks may be slow
};

absl::StatusOr<NcclUniqueId> NewNcclUniqueId();

// kInvalidArgument: options. kFailedPrecondition: more streams than the device has hardware queues
// (raise CUDA_DEVICE_MAX_CONNECTIONS). kDeadlineExceeded. kInternal: CUDA or NCCL, in their words.
absl::StatusOr<std::unique_ptr<Communicator>> MakeNcclCommunicator(const NcclOptions& options);

}  // namespace switchyard
