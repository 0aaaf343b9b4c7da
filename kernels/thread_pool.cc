#include "kernels/thread_pool.h"

#include <array>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "kernels/check.h"
#include "kernels/float_mode.h"
#include "kernels/mutex.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace switchyard {
namespace {

constexpr int kMaxCallers = 64;
constexpr auto kSpin = std::chrono::microseconds(30);

void CpuRelax() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

// Polls `done` for about kSpin; true when it held.
template <typename Predicate>
bool SpinUntil(const Predicate& done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      CpuRelax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

// One ParallelFor in progress; lives on its caller's stack.
struct Job {
  const std::function<void(int64_t)>* fn = nullptr;
  int64_t n = 0;
  std::atomic<int64_t> next{0};
  // Helpers inside Work(). Raised under State::mu while the job is listed, so that it cannot rise
  // once the caller has taken the job off the list.
  std::atomic<int> helpers{0};
  // Guarded by State::mu: the caller sleeps on State::done.
  bool caller_parked = false;

  bool HasWork() const { return next.load(std::memory_order_relaxed) < n; }
  void Work() {
    for (;;) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= n) return;
      (*fn)(i);
    }
  }
};

}  // namespace

struct ThreadPool::State {
  // Constant after construction.
  int num_threads = 1;
  std::vector<std::thread> helpers;

  // Raised whenever a job is listed or the pool stops; helpers spin on it.
  std::atomic<uint64_t> posted{0};

  Mutex mu;
  CondVar wake;  // parked helpers
  CondVar done;  // parked callers
  std::array<Job*, kMaxCallers> jobs SY_GUARDED_BY(mu){};
  int num_jobs SY_GUARDED_BY(mu) = 0;
  int next_job SY_GUARDED_BY(mu) =
      0;  // where the last search ended, so that callers share the helpers
  int parked SY_GUARDED_BY(mu) = 0;
  bool stop SY_GUARDED_BY(mu) = false;

  Job* FindWork() SY_REQUIRES(mu) {
    for (int i = 0; i < num_jobs; ++i) {
      Job* job = jobs[static_cast<size_t>((next_job + i) % num_jobs)];
      if (job->HasWork()) {
        next_job = (next_job + i + 1) % num_jobs;
        return job;
      }
    }
    return nullptr;
  }

  // With kMaxCallers jobs listed, the job stays its caller's alone.
  void Post(Job* job) SY_REQUIRES(mu) {
    if (num_jobs == kMaxCallers) return;
    jobs[static_cast<size_t>(num_jobs++)] = job;
    posted.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i = 0; i < parked && i < job->n - 1; ++i) wake.NotifyOne();
  }

  void Remove(Job* job) SY_REQUIRES(mu) {
    for (int i = 0; i < num_jobs; ++i) {
      if (jobs[static_cast<size_t>(i)] != job) continue;
      jobs[static_cast<size_t>(i)] = jobs[static_cast<size_t>(--num_jobs)];
      return;
    }
  }

  void HelperLoop() {
    const FlushDenormals flush;
    uint64_t seen = 0;
    for (;;) {
      Job* job = nullptr;
      {
        MutexLock lock(mu);
        if (stop) return;
        seen = posted.load(std::memory_order_relaxed);
        job = FindWork();
        if (job != nullptr) job->helpers.fetch_add(1, std::memory_order_relaxed);
      }
      if (job != nullptr) {
        job->Work();
        Leave(job);
        continue;
      }
      if (SpinUntil([&] { return posted.load(std::memory_order_relaxed) != seen; })) continue;
      MutexLock lock(mu);
      ++parked;
      while (posted.load(std::memory_order_relaxed) == seen) wake.Wait(mu);
      --parked;
    }
  }

  // The last touch of `job` by this helper; the caller may return as soon as the count is zero.
  void Leave(Job* job) {
    MutexLock lock(mu);
    const bool notify = job->caller_parked;
    job->helpers.fetch_sub(1, std::memory_order_release);
    if (notify) done.NotifyAll();
  }
};

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>()) {
  SY_CHECK_GE(num_threads, 1);
  state_->num_threads = num_threads;
  for (int i = 1; i < num_threads; ++i)
    state_->helpers.emplace_back([s = state_.get()] { s->HelperLoop(); });
}

ThreadPool::~ThreadPool() {
  {
    MutexLock lock(state_->mu);
    SY_CHECK_EQ(state_->num_jobs, 0);
    state_->stop = true;
    state_->posted.fetch_add(1, std::memory_order_relaxed);
    state_->wake.NotifyAll();
  }
  for (std::thread& t : state_->helpers) t.join();
}

int ThreadPool::num_threads() const { return state_->num_threads; }

void ThreadPool::ParallelFor(int64_t n, const std::function<void(int64_t)>& fn) {
  if (n <= 0) return;
  const FlushDenormals flush;
  if (n == 1 || state_->num_threads == 1) {
    for (int64_t i = 0; i < n; ++i) fn(i);
    return;
  }
  Job job;
  job.fn = &fn;
  job.n = n;
  {
    MutexLock lock(state_->mu);
    state_->Post(&job);
  }
  job.Work();
  {
    MutexLock lock(state_->mu);
    state_->Remove(&job);
  }
  // No helper can join any more. The count's fall to zero is the last thing that a helper does to
  // the job.
  if (SpinUntil([&] { return job.helpers.load(std::memory_order_acquire) == 0; })) return;
  MutexLock lock(state_->mu);
  job.caller_parked = true;
  while (job.helpers.load(std::memory_order_acquire) != 0) state_->done.Wait(state_->mu);
}

}  // namespace switchyard
