// StepQueue: hands steps to a worker's owner thread, in order. Any thread pushes and stops, the
// owner pops; it waits in the pool, where it helps the others of its process to compute.
#pragma once

#include <atomic>
#include <cstddef>
#include <deque>
#include <optional>
#include <utility>

#include "kernels/check.h"
#include "kernels/mutex.h"
#include "kernels/thread_pool.h"

namespace switchyard {

template <typename Step>
class StepQueue {
 public:
  static constexpr size_t kMaxSteps = 8;  // waiting

  explicit StepQueue(ThreadPool* pool) : pool_(pool) {}  // `pool` must outlive it

  // REQUIRES: fewer than kMaxSteps are waiting.
  void Push(Step step) {
    {
      MutexLock lock(mu_);
      SY_CHECK_LT(steps_.size(), kMaxSteps);
      steps_.push_back(std::move(step));
      news_.store(true, std::memory_order_release);
    }
    pool_->Wake(this);
  }

  // None once stopped, whatever is waiting.
  std::optional<Step> Pop() {
    pool_->Await(this, [this] { return news_.load(std::memory_order_acquire); });
    MutexLock lock(mu_);
    if (stopped_) return std::nullopt;
    std::optional<Step> step(std::move(steps_.front()));
    steps_.pop_front();
    news_.store(!steps_.empty(), std::memory_order_relaxed);
    return step;
  }

  void Stop() {
    {
      MutexLock lock(mu_);
      stopped_ = true;
      news_.store(true, std::memory_order_release);
    }
    pool_->Wake(this);
  }

  size_t size() const {
    MutexLock lock(mu_);
    return steps_.size();
  }

 private:
  ThreadPool* const pool_;
  std::atomic<bool> news_{false};  // the owner need not wait
  mutable Mutex mu_;
  std::deque<Step> steps_ SY_GUARDED_BY(mu_);
  bool stopped_ SY_GUARDED_BY(mu_) = false;
};

}  // namespace switchyard
