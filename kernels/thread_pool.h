// ThreadPool: the one compute pool of a process, and where its threads wait for one another.
// `num_threads` is the total that computes at once for one caller: the caller works too, so
// num_threads - 1 helpers are started. Several threads may call ParallelFor at the same time.
// Waking a thread that sleeps costs some 50 µs on a virtual machine, so those that wait (Await)
// compute for the others meanwhile, spin briefly and only then sleep; helpers are woken where these
// are too few. No more threads are kept awake than compute at once, as one too many may hold the
// core that another one needs. Never holds user state.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

namespace switchyard {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();  // REQUIRES: nobody is in ParallelFor or Await
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Runs fn(i) for every i in [0, n), handed out dynamically; returns when all are done. n == 1
  // runs on the caller with no synchronisation. fn must not call ParallelFor and must not throw.
  void ParallelFor(int64_t n, const std::function<void(int64_t)>& fn);

  // Blocks until `ready` holds or the deadline has passed; returns what `ready` said last. `ready`
  // is polled, also under the pool's lock: it must not block. Whoever makes it hold calls Wake with
  // the same key afterwards, any address that both know. An item that it has begun for somebody may
  // end after the deadline.
  bool Await(const void* key, const std::function<bool()>& ready,
             std::chrono::steady_clock::time_point deadline =
                 std::chrono::steady_clock::time_point::max());
  void Wake(const void* key);

  // Says that the thread that makes one computes for this pool's process also between its calls: it
  // counts as awake unless it sleeps in Await.
  class Owner {
   public:
    explicit Owner(ThreadPool* pool);
    ~Owner();
    Owner(const Owner&) = delete;
    Owner& operator=(const Owner&) = delete;

   private:
    ThreadPool* const pool_;
  };

  // Says that the owner that makes one may sleep elsewhere than in Await.
  class Blocked {
   public:
    explicit Blocked(ThreadPool* pool);
    ~Blocked();
    Blocked(const Blocked&) = delete;
    Blocked& operator=(const Blocked&) = delete;

   private:
    ThreadPool* const pool_;
  };

  int num_threads() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace switchyard
