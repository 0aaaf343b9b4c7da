// ThreadPool: the one compute pool of a process. `num_threads` is the total that computes at once
// for one caller: the caller works too, so num_threads - 1 helpers are started. Several owner
// threads may call ParallelFor at the same time; helpers serve whichever has work. Helpers spin
// briefly, then park. Never holds user state.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace switchyard {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Runs fn(i) for every i in [0, n), handed out dynamically; returns when all are done. n == 1
  // runs on the caller with no synchronisation. fn must not call ParallelFor and must not throw.
  void ParallelFor(int64_t n, const std::function<void(int64_t)>& fn);

  int num_threads() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace switchyard
