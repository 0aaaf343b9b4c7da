// WaitingCommunicator: a rank's communicator that tells whether the rank waits for its peers just
// now (a rank that waits is not one that hangs), how long it has waited and what it has sent, and
// whose owner thread counts as blocked in its pool meanwhile. Used like the communicator that it
// owns; the figures may be read by any thread and go on through the epochs.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>

#include "comm/communicator.h"
#include "kernels/thread_pool.h"

namespace switchyard {

struct DataPlaneFigures {
  std::atomic<bool> waiting{false};
  std::atomic<uint64_t> wait_ns{0};
  std::array<std::atomic<uint64_t>, 4> sent_bytes{};  // by MessageKind; to oneself too
};

class WaitingCommunicator final : public Communicator {
 public:
  // `pool` and `figures` must outlive it.
  WaitingCommunicator(std::unique_ptr<Communicator> inner, ThreadPool* pool,
                      DataPlaneFigures* figures)
      : inner_(std::move(inner)), pool_(pool), figures_(figures) {}

  int32_t rank() const override { return inner_->rank(); }
  int32_t size() const override { return inner_->size(); }
  absl::Status Start(int32_t group, std::span<const SendOp> sends,
                     std::span<RecvOp> recvs) override {
    for (const SendOp& send : sends) {
      figures_->sent_bytes[static_cast<size_t>(send.tag.kind)].fetch_add(send.data.size(),
                                                                         std::memory_order_relaxed);
    }
    return inner_->Start(group, sends, recvs);
  }
  absl::Status Wait(int32_t group, std::chrono::steady_clock::time_point deadline) override {
    const auto start = std::chrono::steady_clock::now();
    figures_->waiting.store(true, std::memory_order_relaxed);
    const ThreadPool::Blocked blocked(pool_);
    absl::Status status = inner_->Wait(group, deadline);
    figures_->waiting.store(false, std::memory_order_relaxed);
    const std::chrono::nanoseconds waited = std::chrono::steady_clock::now() - start;
    figures_->wait_ns.fetch_add(static_cast<uint64_t>(waited.count()), std::memory_order_relaxed);
    return status;
  }
  void Abort(const absl::Status& reason) override { inner_->Abort(reason); }

 private:
  const std::unique_ptr<Communicator> inner_;
  ThreadPool* const pool_;
  DataPlaneFigures* const figures_;
};

}  // namespace switchyard
