#include "kernels/thread_pool.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/check.h"
#include "kernels/float_mode.h"
#include "kernels/mutex.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMaxCallers = 64;
constexpr std::chrono::microseconds kSpin(10);        // of a thread without work
constexpr std::chrono::microseconds kCallerSpin(30);  // of a caller for those on its last items
// A thread that did not get to look at the clock for so long was not running: others compute on
// these cores. For a while threads then spin shortly, as a third of the speed would be lost.
constexpr std::chrono::microseconds kNotPolling(100);
constexpr std::chrono::milliseconds kDisturbed(300);
constexpr std::chrono::microseconds kDisturbedSpin(3);
// So long an owner spins even where enough others are awake: they may be about to sleep.
constexpr std::chrono::microseconds kCrowdedSpin(2);

// One ParallelFor in progress; lives on its caller's stack.
struct Job {
  const std::function<void(int64_t)>* fn = nullptr;
  int64_t n = 0;
  std::atomic<int64_t> next{0};
  // Others inside Work(). Raised under State::mu while the job is listed, so that it cannot rise
  // once the caller has taken the job off the list.
  std::atomic<int> helpers{0};
  // Guarded by State::mu: the caller sleeps on State::done.
  bool caller_parked = false;

  bool HasWork() const { return next.load(std::memory_order_relaxed) < n; }
  // Until `ready` holds, or nothing is left to begin.
  template <typename Ready>
  void Work(const Ready& ready) {
    while (!ready()) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= n) return;
      (*fn)(i);
    }
  }
};

// A thread that sleeps, or slept: they are kept, as who wakes one touches it without the lock.
struct Sleeper {
  const void* key = nullptr;  // null: a helper
  bool woken = false;
  CondVar changed;
};

// The state whose Owner this thread is.
thread_local const void* owner_of = nullptr;

}  // namespace

struct ThreadPool::State {
  // Constant after construction.
  int num_threads = 1;
  int max_awake = 1;  // that many may spin, computing threads among them
  std::vector<std::thread> helpers;

  // Raised whenever a job is listed; whoever waits spins on it.
  std::atomic<uint64_t> posted{0};
  // Helpers and owners that do not sleep, and other threads in ParallelFor or Await. A sleeper is
  // counted again by who wakes it.
  std::atomic<int> awake{0};
  std::atomic<bool> stop{false};
  std::atomic<int64_t> disturbed_until{0};  // of Clock

  Mutex mu;
  CondVar done;  // parked callers
  std::array<Job*, kMaxCallers> jobs SY_GUARDED_BY(mu){};
  int num_jobs SY_GUARDED_BY(mu) = 0;
  int next_job SY_GUARDED_BY(mu) =
      0;  // where the last search ended, so that callers share the helpers
  std::vector<Sleeper*> asleep SY_GUARDED_BY(mu);  // the last to go to sleep at the end
  std::vector<Sleeper*> unused SY_GUARDED_BY(mu);
  std::vector<std::unique_ptr<Sleeper>> sleepers SY_GUARDED_BY(mu);

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

  // Its `changed` is to be notified without the lock, which it wants next.
  void Rouse(Sleeper* sleeper) SY_REQUIRES(mu) {
    std::erase(asleep, sleeper);
    sleeper->woken = true;
    awake.fetch_add(1, std::memory_order_relaxed);
  }

  // One more for a job, if there are too few: an owner rather than a helper, as it will be needed
  // next. Roused, or null.
  Sleeper* RouseForWork() SY_REQUIRES(mu) {
    if (awake.load(std::memory_order_relaxed) >= num_threads || asleep.empty()) return nullptr;
    const auto owner = std::find_if(asleep.rbegin(), asleep.rend(),
                                    [](const Sleeper* s) { return s->key != nullptr; });
    Sleeper* const sleeper = owner != asleep.rend() ? *owner : asleep.back();
    Rouse(sleeper);
    return sleeper;
  }

  // With kMaxCallers jobs listed, the job stays its caller's alone.
  void Post(Job* job) {
    Sleeper* sleeper = nullptr;
    {
      MutexLock lock(mu);
      if (num_jobs == kMaxCallers) return;
      jobs[static_cast<size_t>(num_jobs++)] = job;
      posted.fetch_add(1, std::memory_order_relaxed);
      sleeper = RouseForWork();
    }
    for (int64_t others = 1; sleeper != nullptr; ++others) {
      sleeper->changed.NotifyOne();
      if (others + 1 >= job->n || !job->HasWork()) return;
      MutexLock lock(mu);
      sleeper = RouseForWork();
    }
  }

  void Remove(Job* job) SY_REQUIRES(mu) {
    for (int i = 0; i < num_jobs; ++i) {
      if (jobs[static_cast<size_t>(i)] != job) continue;
      jobs[static_cast<size_t>(i)] = jobs[static_cast<size_t>(--num_jobs)];
      return;
    }
  }

  void NoteDisturbance(Clock::time_point now) {
    disturbed_until.store((now + kDisturbed).time_since_epoch().count(), std::memory_order_relaxed);
  }

  // Polls `done` for about `time`; true when it held.
  template <typename Predicate>
  bool SpinUntil(const Predicate& done, std::chrono::nanoseconds time) {
    const Clock::time_point start = Clock::now();
    if (start.time_since_epoch().count() < disturbed_until.load(std::memory_order_relaxed))
      time = std::min<std::chrono::nanoseconds>(time, kDisturbedSpin);
    Clock::time_point now = start;
    do {
      for (int i = 0; i < 32; ++i) {
        if (done()) return true;
        CpuRelax();
      }
      const Clock::time_point last = std::exchange(now, Clock::now());
      if (now - last > kNotPolling) NoteDisturbance(now);
    } while (now - start < time);
    return done();
  }

  bool Crowded() const { return awake.load(std::memory_order_relaxed) > max_awake; }

  // Works for callers until `ready` holds (true) or until the thread should sleep: nobody had work
  // for the time of a spin, too many are awake (`crowded`), or it is late. `seen` is the value of
  // `posted` whose jobs were looked at last.
  template <typename Ready, typename Late>
  bool Serve(const Ready& ready, const Late& late, bool is_owner, uint64_t* seen, bool* crowded) {
    while (!ready()) {
      Job* job = nullptr;
      {
        MutexLock lock(mu);
        *seen = posted.load(std::memory_order_relaxed);
        job = FindWork();
        if (job != nullptr) job->helpers.fetch_add(1, std::memory_order_relaxed);
      }
      if (job != nullptr) {
        job->Work(ready);
        Leave(job);
        if (late()) return false;
        continue;
      }
      const auto news = [&] { return ready() || posted.load(std::memory_order_relaxed) != *seen; };
      if (is_owner && SpinUntil(news, kCrowdedSpin)) continue;
      *crowded = false;
      SpinUntil([&] { return news() || (*crowded = Crowded()); }, kSpin);
      if (!news()) return false;
    }
    return true;
  }

  // As ThreadPool::Await; the thread counts as awake.
  template <typename Ready>
  bool Await(const void* key, const Ready& ready, Clock::time_point deadline) {
    const auto late = [&] {
      return deadline != Clock::time_point::max() && Clock::now() >= deadline;
    };
    for (;;) {
      uint64_t seen = 0;
      bool crowded = false;
      if (Serve(ready, late, key != nullptr, &seen, &crowded)) return true;
      if (late()) return ready();
      MutexLock lock(mu);
      if (ready()) return true;
      if (posted.load(std::memory_order_relaxed) != seen) continue;
      if (crowded && !Crowded()) continue;  // another one went
      Sleeper* const self = NewSleeper(key);
      asleep.push_back(self);
      awake.fetch_sub(1, std::memory_order_relaxed);
      while (!self->woken) {
        if (deadline == Clock::time_point::max()) {
          self->changed.Wait(mu);
        } else if (!self->changed.WaitUntil(mu, deadline) && !self->woken) {
          Rouse(self);
        }
      }
      unused.push_back(self);
    }
  }

  Sleeper* NewSleeper(const void* key) SY_REQUIRES(mu) {
    if (unused.empty()) unused.push_back(sleepers.emplace_back(new Sleeper).get());
    Sleeper* const sleeper = unused.back();
    unused.pop_back();
    sleeper->key = key;
    sleeper->woken = false;
    return sleeper;
  }

  void HelperLoop() {
    const FlushDenormals flush;
    Await(
        nullptr, [this] { return stop.load(std::memory_order_relaxed); }, Clock::time_point::max());
  }

  // The last touch of `job` by this helper; the caller may return as soon as the count is zero.
  void Leave(Job* job) {
    MutexLock lock(mu);
    const bool notify = job->caller_parked;
    job->helpers.fetch_sub(1, std::memory_order_release);
    if (notify) done.NotifyAll();
  }
};

namespace {

// Counts a thread that is no owner as awake.
class CountAwake {
 public:
  CountAwake(const void* state, std::atomic<int>* awake)
      : awake_(owner_of == state ? nullptr : awake) {
    if (awake_ != nullptr) awake_->fetch_add(1, std::memory_order_relaxed);
  }
  ~CountAwake() {
    if (awake_ != nullptr) awake_->fetch_sub(1, std::memory_order_relaxed);
  }
  CountAwake(const CountAwake&) = delete;
  CountAwake& operator=(const CountAwake&) = delete;

 private:
  std::atomic<int>* const awake_;
};

}  // namespace

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>()) {
  SY_CHECK_GE(num_threads, 1);
  state_->num_threads = num_threads;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());  // 0: unknown
  state_->max_awake = std::min(num_threads, std::max(cores, 1));
  state_->awake.store(num_threads - 1);
  for (int i = 1; i < num_threads; ++i)
    state_->helpers.emplace_back([s = state_.get()] { s->HelperLoop(); });
}

ThreadPool::~ThreadPool() {
  {
    MutexLock lock(state_->mu);
    SY_CHECK_EQ(state_->num_jobs, 0);
    state_->stop.store(true, std::memory_order_relaxed);
    while (!state_->asleep.empty()) {
      Sleeper* const sleeper = state_->asleep.back();
      SY_CHECK(sleeper->key == nullptr);  // a helper
      state_->Rouse(sleeper);
      sleeper->changed.NotifyOne();
    }
  }
  for (std::thread& t : state_->helpers) t.join();
}

int ThreadPool::num_threads() const { return state_->num_threads; }

ThreadPool::Owner::Owner(ThreadPool* pool) : pool_(pool) {
  SY_CHECK(owner_of == nullptr);
  owner_of = pool->state_.get();
  pool->state_->awake.fetch_add(1, std::memory_order_relaxed);
}

ThreadPool::Owner::~Owner() {
  owner_of = nullptr;
  pool_->state_->awake.fetch_sub(1, std::memory_order_relaxed);
}

ThreadPool::Blocked::Blocked(ThreadPool* pool) : pool_(pool) {
  SY_CHECK(owner_of == pool->state_.get());
  pool->state_->awake.fetch_sub(1, std::memory_order_relaxed);
}

ThreadPool::Blocked::~Blocked() { pool_->state_->awake.fetch_add(1, std::memory_order_relaxed); }

bool ThreadPool::Await(const void* key, const std::function<bool()>& ready,
                       Clock::time_point deadline) {
  SY_CHECK(key != nullptr);
  if (ready()) return true;
  const FlushDenormals flush;
  const CountAwake count(state_.get(), &state_->awake);
  return state_->Await(key, ready, deadline);
}

void ThreadPool::Wake(const void* key) {
  SY_CHECK(key != nullptr);
  for (;;) {
    Sleeper* sleeper = nullptr;
    {
      MutexLock lock(state_->mu);
      const auto found = std::ranges::find(state_->asleep, key, &Sleeper::key);
      if (found == state_->asleep.end()) return;
      sleeper = *found;
      state_->Rouse(sleeper);
    }
    sleeper->changed.NotifyOne();
  }
}

void ThreadPool::ParallelFor(int64_t n, const std::function<void(int64_t)>& fn) {
  if (n <= 0) return;
  const FlushDenormals flush;
  if (n == 1 || state_->num_threads == 1) {
    for (int64_t i = 0; i < n; ++i) fn(i);
    return;
  }
  const CountAwake count(state_.get(), &state_->awake);
  Job job;
  job.fn = &fn;
  job.n = n;
  state_->Post(&job);
  job.Work([] { return false; });
  {
    MutexLock lock(state_->mu);
    state_->Remove(&job);
  }
  // No helper can join any more. The count's fall to zero is the last thing that a helper does to
  // the job.
  const auto alone = [&] { return job.helpers.load(std::memory_order_acquire) == 0; };
  if (state_->SpinUntil(alone, kCallerSpin)) return;
  MutexLock lock(state_->mu);
  job.caller_parked = true;
  state_->awake.fetch_sub(1, std::memory_order_relaxed);
  while (!alone()) state_->done.Wait(state_->mu);
  state_->awake.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace switchyard
