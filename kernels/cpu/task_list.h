// TaskList: the parts of an op that depend on one another, as one list for a ThreadPool. A task may
// need a stage, a set of earlier tasks, to be done. As items are handed out in order, whatever it
// waits for is being worked on or done, so one ParallelFor suffices where there would be one for
// every stage, each of which ends with threads that wait for the last one.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels/mutex.h"

namespace switchyard::cpu {

class TaskList {
 public:
  static constexpr int32_t kNone = -1;
  struct Task {
    int32_t kind = 0;
    int32_t index = 0;       // what it means is up to the op
    int32_t needs = kNone;   // a stage
    int32_t serves = kNone;  // a stage that is done when all tasks that serve it are
  };

  // Empty, with stages 0 … num_stages - 1.
  void Reset(int32_t num_stages) {
    tasks_.clear();
    if (left_.size() < static_cast<size_t>(num_stages))
      left_ = std::vector<std::atomic<int32_t>>(static_cast<size_t>(num_stages));
    for (int32_t s = 0; s < num_stages; ++s) Left(s).store(0, std::memory_order_relaxed);
  }
  // REQUIRES: whatever serves the stage that it needs was added before.
  void Add(const Task& task) {
    tasks_.push_back(task);
    if (task.serves != kNone) Left(task.serves).fetch_add(1, std::memory_order_relaxed);
  }
  int64_t size() const { return static_cast<int64_t>(tasks_.size()); }
  // Null beyond the end.
  const Task* Find(int64_t i) const {
    return i < size() ? &tasks_[static_cast<size_t>(i)] : nullptr;
  }

  // Runs task i; any thread, every task once, begun in order.
  template <typename Fn>
  void Run(int64_t i, const Fn& fn) {
    const Task& task = tasks_[static_cast<size_t>(i)];
    if (task.needs != kNone) WaitFor(task.needs);
    fn(task);
    if (task.serves != kNone) Left(task.serves).fetch_sub(1, std::memory_order_release);
  }

 private:
  std::atomic<int32_t>& Left(int32_t stage) { return left_[static_cast<size_t>(stage)]; }
  // Short, unless a thread that works on the stage was preempted.
  void WaitFor(int32_t stage) {
    constexpr int kSpins = 2000;
    for (int spins = 0; Left(stage).load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) {
        CpuRelax();
      } else {
        std::this_thread::yield();
      }
    }
  }

  std::vector<Task> tasks_;
  std::vector<std::atomic<int32_t>> left_;  // per stage: tasks that are not done
};

}  // namespace switchyard::cpu
