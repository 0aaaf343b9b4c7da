// Mutex, MutexLock and CondVar over std::mutex with clang's thread-safety annotations (checked by
// the clang preset). Debian's Abseil is not instrumented, so absl::Mutex would hide races from
// ThreadSanitizer.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#if defined(__SANITIZE_THREAD__)
#define SY_TSAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SY_TSAN
#endif
#endif
#if defined(__clang__)
#define SY_TS_ATTR(x) __attribute__((x))
#else
#define SY_TS_ATTR(x)
#endif
#define SY_GUARDED_BY(mu) SY_TS_ATTR(guarded_by(mu))
#define SY_PT_GUARDED_BY(mu) SY_TS_ATTR(pt_guarded_by(mu))
#define SY_REQUIRES(...) SY_TS_ATTR(requires_capability(__VA_ARGS__))
#define SY_EXCLUDES(...) SY_TS_ATTR(locks_excluded(__VA_ARGS__))

namespace switchyard {

// In a loop that polls: leaves the core's other resources to others for a moment.
inline void CpuRelax() {
#if defined(__SSE2__)
  __builtin_ia32_pause();
#endif
}

class SY_TS_ATTR(capability("mutex")) Mutex {
 public:
  // Who holds one is out again within a fraction of what a sleep costs, unless it was preempted.
  void Lock() SY_TS_ATTR(acquire_capability()) {
#if !defined(SY_TSAN)  // it leaves try_lock out of the order of locks
    for (int i = 0; i < kSpins; ++i) {
      if (mu_.try_lock()) return;
      CpuRelax();
    }
#endif
    mu_.lock();
  }
  void Unlock() SY_TS_ATTR(release_capability()) { mu_.unlock(); }

 private:
  friend class CondVar;
  [[maybe_unused]] static constexpr int kSpins = 100;  // some microseconds
  std::mutex mu_;
};

class SY_TS_ATTR(scoped_lockable) MutexLock {
 public:
  explicit MutexLock(Mutex& mu) SY_TS_ATTR(acquire_capability(mu)) : mu_(mu) { mu_.Lock(); }
  ~MutexLock() SY_TS_ATTR(release_capability()) { mu_.Unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mu_;
};

// Wake-ups may be spurious: always wait in a loop on the condition.
class CondVar {
 public:
  void Wait(Mutex& mu) SY_REQUIRES(mu) {
    std::unique_lock<std::mutex> lock(mu.mu_, std::adopt_lock);
    cv_.wait(lock);
    lock.release();
  }
  // Returns false when `deadline` passed.
  bool WaitUntil(Mutex& mu, std::chrono::steady_clock::time_point deadline) SY_REQUIRES(mu) {
    std::unique_lock<std::mutex> lock(mu.mu_, std::adopt_lock);
    const bool in_time = cv_.wait_until(lock, deadline) == std::cv_status::no_timeout;
    lock.release();
    return in_time;
  }
  void NotifyOne() { cv_.notify_one(); }
  void NotifyAll() { cv_.notify_all(); }

 private:
  std::condition_variable cv_;
};

}  // namespace switchyard
