#include "comm/nccl_link.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {

absl::Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": CUDA: ", cudaGetErrorString(error)));
}

absl::Status NcclStatus(ncclResult_t result, const char* what) {
  if (result == ncclSuccess || result == ncclInProgress) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": NCCL: ", ncclGetErrorString(result)));
}

absl::StatusOr<bool> IsReady(ncclComm_t comm, const char* what) {
  ncclResult_t state = ncclSuccess;
  absl::Status status = NcclStatus(ncclCommGetAsyncError(comm, &state), what);
  if (status.ok()) status = NcclStatus(state, what);
  if (!status.ok()) return status;
  return state == ncclSuccess;
}

ncclConfig_t NonBlockingConfig() {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;  // every call returns at once, so that a deadline or an abort can end it
  config.minCTAs = 1;
  config.maxCTAs = 1;  // a kernel that waits for its peer occupies one block
  return config;
}

NcclLink::NcclLink(bool sends, size_t max_message_bytes)
    : sends_(sends), capacity_(std::max(max_message_bytes, sizeof(NcclHeader))) {}

NcclLink::~NcclLink() {
  Abort();
  if (device_ != nullptr) (void)cudaFree(device_);  // waits for the device
  if (event_ != nullptr) (void)cudaEventDestroy(event_);
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  if (host_ != nullptr) (void)cudaFreeHost(host_);
}

absl::Status NcclLink::Allocate() {
  void* host = nullptr;
  void* device = nullptr;
  absl::Status status = CudaStatus(cudaMallocHost(&host, capacity_), "pinned buffer");
  host_ = static_cast<std::byte*>(host);
  if (status.ok()) status = CudaStatus(cudaMalloc(&device, capacity_), "device buffer");
  device_ = static_cast<std::byte*>(device);
  if (status.ok()) {
    status = CudaStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  }
  if (status.ok()) {
    status = CudaStatus(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "event");
  }
  return status;
}

absl::Status NcclLink::Launch(Phase next, size_t bytes) {
  SY_CHECK(!launching_ && bytes > 0 && bytes <= capacity_);
  const int other = sends_ ? 1 : 0;
  phase = next;
  launching_ = true;
  bytes_ = bytes;
  if (!sends_) {
    return NcclStatus(ncclRecv(device_, bytes, ncclUint8, other, comm, stream_), "receive");
  }
  absl::Status status = CudaStatus(
      cudaMemcpyAsync(device_, host_, bytes, cudaMemcpyHostToDevice, stream_), "copy to device");
  if (!status.ok()) return status;
  return NcclStatus(ncclSend(device_, bytes, ncclUint8, other, comm, stream_), "send");
}

absl::StatusOr<bool> NcclLink::Done() {
  const absl::StatusOr<bool> ready = IsReady(comm, sends_ ? "send" : "receive");
  if (!ready.ok() || !*ready) return ready;
  if (launching_) {  // the kernel is in the stream only now
    absl::Status status;
    if (!sends_) {
      status = CudaStatus(cudaMemcpyAsync(host_, device_, bytes_, cudaMemcpyDeviceToHost, stream_),
                          "copy back");
    }
    if (status.ok()) status = CudaStatus(cudaEventRecord(event_, stream_), "event");
    if (!status.ok()) return status;
    launching_ = false;
  }
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) return false;
  if (error != cudaSuccess) return CudaStatus(error, "transfer");
  return true;
}

void NcclLink::Abort() {
  if (comm != nullptr) (void)ncclCommAbort(std::exchange(comm, nullptr));
}

}  // namespace switchyard
