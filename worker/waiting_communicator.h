// WaitingCommunicator: a rank's communicator that tells whether the rank waits for its peers just
// now: a rank that waits is not one that hangs. Used like the communicator that it owns; waiting()
// may be read by any thread.
#pragma once

#include <atomic>
#include <memory>
#include <utility>

#include "comm/communicator.h"

namespace switchyard {

class WaitingCommunicator final : public Communicator {
 public:
  // `waiting` must outlive it.
  WaitingCommunicator(std::unique_ptr<Communicator> inner, std::atomic<bool>* waiting)
      : inner_(std::move(inner)), waiting_(waiting) {}

  int32_t rank() const override { return inner_->rank(); }
  int32_t size() const override { return inner_->size(); }
  absl::Status Start(std::span<const SendOp> sends, std::span<RecvOp> recvs) override {
    return inner_->Start(sends, recvs);
  }
  absl::Status Wait(std::chrono::steady_clock::time_point deadline) override {
    waiting_->store(true, std::memory_order_relaxed);
    absl::Status status = inner_->Wait(deadline);
    waiting_->store(false, std::memory_order_relaxed);
    return status;
  }
  void Abort(const absl::Status& reason) override { inner_->Abort(reason); }

 private:
  const std::unique_ptr<Communicator> inner_;
  std::atomic<bool>* const waiting_;
};

}  // namespace switchyard
