// FaultyCommunicator: a communicator that misbehaves as its plan says, over any other one. For
// tests of what stands above a Communicator. Threads as in communicator.h; the plan is asked on the
// owner thread.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/communicator.h"
#include "kernels/mutex.h"

namespace switchyard {

struct SendFault {
  bool drop = false;    // the message never leaves; its sender believes that it did
  size_t truncate = 0;  // bytes that are missing at its end
};

struct FaultPlan {
  std::function<SendFault(const SendOp&)> on_send{};  // empty: no faults
  std::chrono::milliseconds start_delay{0};           // before every Start
  std::chrono::milliseconds wait_delay{0};            // a slow peer: before every Wait
  int64_t kill_at_start = -1;  // the rank is lost instead of its n-th Start, from 0; -1: never
};

class FaultyCommunicator final : public Communicator {
 public:
  FaultyCommunicator(std::unique_ptr<Communicator> inner, FaultPlan plan)
      : plan_(std::move(plan)),
        rank_(inner->rank()),
        size_(inner->size()),
        inner_(std::move(inner)) {}

  int32_t rank() const override { return rank_; }
  int32_t size() const override { return size_; }

  absl::Status Start(int32_t group, std::span<const SendOp> sends,
                     std::span<RecvOp> recvs) override {
    std::this_thread::sleep_for(plan_.start_delay);
    if (num_starts_++ == plan_.kill_at_start) {
      MutexLock lock(mu_);
      inner_.reset();
    }
    if (inner_ == nullptr) return Killed();
    if (!plan_.on_send) return inner_->Start(group, sends, recvs);
    // The inner communicator may keep the array until Wait returned.
    std::vector<SendOp>& changed = groups_[static_cast<size_t>(group)].emplace_back();
    for (SendOp send : sends) {
      const SendFault fault = plan_.on_send(send);
      if (fault.drop) continue;
      send.data = send.data.first(send.data.size() - std::min(fault.truncate, send.data.size()));
      changed.push_back(send);
    }
    return inner_->Start(group, changed, recvs);
  }

  absl::Status Wait(int32_t group, std::chrono::steady_clock::time_point deadline) override {
    std::this_thread::sleep_for(plan_.wait_delay);
    if (inner_ == nullptr) return Killed();
    absl::Status status = inner_->Wait(group, deadline);
    groups_[static_cast<size_t>(group)].clear();
    return status;
  }

  void Abort(const absl::Status& reason) override {
    MutexLock lock(mu_);
    if (inner_ != nullptr) inner_->Abort(reason);
  }

 private:
  absl::Status Killed() const {
    return absl::AbortedError(absl::StrCat("rank ", rank_, " was killed by the test"));
  }

  const FaultPlan plan_;
  const int32_t rank_;
  const int32_t size_;
  // Owner thread only.
  int64_t num_starts_ = 0;
  std::array<std::vector<std::vector<SendOp>>, kNumGroups> groups_;  // under way
  Mutex mu_;  // held by Abort, and where the owner thread resets inner_
  std::unique_ptr<Communicator> inner_;
};

}  // namespace switchyard
