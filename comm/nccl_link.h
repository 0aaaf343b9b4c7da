// One end of a directed pair of ranks: an NCCL communicator of two, its stream and its staging
// buffers. One transfer at a time, no call blocks. Owner thread of the rank only, with the rank's
// device current.
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace switchyard {

// What goes before the bytes of every message.
struct NcclHeader {
  uint64_t size = 0;  // bytes that follow; 0: none
  uint64_t step = 0;
  int32_t layer = 0;
  int32_t micro_batch = 0;
  uint32_t kind = 0;
  uint32_t part = 0;
};

absl::Status CudaStatus(cudaError_t error, const char* what);
absl::Status NcclStatus(ncclResult_t result, const char* what);  // under way is OK
// True when the communicator has done the host's part of its last call.
absl::StatusOr<bool> IsReady(ncclComm_t comm, const char* what);
ncclConfig_t NonBlockingConfig();

class NcclLink {
 public:
  enum class Phase : uint8_t { kIdle, kHeader, kPayload };

  NcclLink(bool sends, size_t max_message_bytes);
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;
  ~NcclLink();

  absl::Status Allocate();
  // Moves the first `bytes` of buffer() to, or from, the other end. REQUIRES: nothing under way.
  absl::Status Launch(Phase next, size_t bytes);
  // True when the launched transfer is complete.
  absl::StatusOr<bool> Done();
  void Abort();

  std::byte* buffer() { return host_; }

  ncclComm_t comm = nullptr;  // of the two ranks; rank 0 is the sender
  Phase phase = Phase::kIdle;
  NcclHeader header;  // of the message under way to this rank

 private:
  const bool sends_;
  const size_t capacity_;
  std::byte* host_ = nullptr;    // [capacity_], pinned
  std::byte* device_ = nullptr;  // [capacity_]
  cudaStream_t stream_ = nullptr;
  cudaEvent_t event_ = nullptr;  // after the transfer
  bool launching_ = false;       // NCCL has not put the kernel into the stream yet
  size_t bytes_ = 0;
};

}  // namespace switchyard
