// ProcessMemory: the sum of what the roles of one process use, checked at every change against what
// was available when it started. Owned by the WorkerProcess; any thread.
#pragma once

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/mutex.h"
#include "worker/memory_plan.h"

namespace switchyard {

class ProcessMemory {
 public:
  // `model` and `backend`, one like those of the workers, must outlive it.
  ProcessMemory(const OpenedModel* model, const ComputeBackend* backend, const MemoryUse& use,
                int64_t available_bytes)
      : model_(model), backend_(backend), available_bytes_(available_bytes), use_(use) {}

  // Applies the change, or refuses it with the numbers.
  absl::Status Change(const std::function<void(MemoryUse*)>& change) {
    MutexLock lock(mu_);
    MemoryUse use = use_;
    change(&use);
    const absl::StatusOr<int64_t> left = MemoryLeft(*model_, use, *backend_, available_bytes_);
    if (!left.ok()) return left.status();
    use_ = use;
    return absl::OkStatus();
  }
  int64_t available_bytes() const { return available_bytes_; }

 private:
  const OpenedModel* const model_;
  const ComputeBackend* const backend_;
  const int64_t available_bytes_;
  Mutex mu_;
  MemoryUse use_ SY_GUARDED_BY(mu_);
};

}  // namespace switchyard
