// TaskPool: the small pool on which tokenizing, templates and JSON work run, so that I/O threads
// and the scheduler's thread only enqueue. Owned by the server; Post may be called from any thread.
// The queue is bounded by its users: each connection and each stream has at most one task in it.
#pragma once

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/mutex.h"

namespace switchyard {

class TaskPool {
 public:
  explicit TaskPool(int num_threads);
  // Runs what is queued, then joins. REQUIRES: not called on a thread of the pool.
  ~TaskPool();
  TaskPool(const TaskPool&) = delete;
  TaskPool& operator=(const TaskPool&) = delete;

  // After Stop a task is dropped.
  void Post(std::function<void()> task);
  // Runs what is queued, then joins. Idempotent; one thread.
  void Stop();

 private:
  void Run();

  Mutex mu_;
  CondVar wake_;
  std::deque<std::function<void()>> tasks_ SY_GUARDED_BY(mu_);
  bool stopping_ SY_GUARDED_BY(mu_) = false;
  bool stopped_ SY_GUARDED_BY(mu_) = false;  // the threads are gone
  std::vector<std::thread> threads_;         // constant until Stop
};

}  // namespace switchyard
