#include "kernels/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "kernels/bandwidth_probe.h"
#include "kernels/mutex.h"

namespace switchyard {
namespace {

// Longer than threads without work spin, most times.
void Pause() {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
  while (std::chrono::steady_clock::now() < until) std::this_thread::yield();
}

TEST(ThreadPoolTest, EveryIndexRunsOnce) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (int64_t n : {0, 1, 2, 7, 1000}) {
      std::vector<int> runs(static_cast<size_t>(n),
                            0);  // plain ints: TSan sees an index that runs twice at once
      pool.ParallelFor(n, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
      for (int r : runs) ASSERT_EQ(r, 1) << threads << " threads, n " << n;
    }
  }
}

TEST(ThreadPoolTest, WritesAreVisibleToTheCaller) {
  ThreadPool pool(4);
  int64_t plain[64];
  for (int64_t round = 0; round < 5000; ++round) {
    pool.ParallelFor(64, [&](int64_t i) { plain[i] = round + i; });
    for (int64_t i = 0; i < 64; ++i) ASSERT_EQ(plain[i], round + i);
  }
}

TEST(ThreadPoolTest, ManyCallersAtOnce) {
  ThreadPool pool(3);
  std::atomic<int64_t> total{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 70; ++c) {  // more than the pool lists at once
    callers.emplace_back([&, c] {
      for (int round = 0; round < 50; ++round) {
        std::vector<int64_t> out(static_cast<size_t>(5 + c % 7));
        pool.ParallelFor(static_cast<int64_t>(out.size()),
                         [&](int64_t i) { out[static_cast<size_t>(i)] = i + c; });
        for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], static_cast<int64_t>(i) + c);
        total.fetch_add(static_cast<int64_t>(out.size()));
      }
    });
  }
  for (std::thread& t : callers) t.join();
  int64_t want = 0;
  for (int c = 0; c < 70; ++c) want += 50 * (5 + c % 7);
  EXPECT_EQ(total.load(), want);
}

// The caller cannot finish alone: each index waits until both are running.
TEST(ThreadPoolTest, HelpersWakeFromThePark) {
  ThreadPool pool(2);
  for (int round = 0; round < 20; ++round) {
    Pause();  // the helper has parked
    std::atomic<int> running{0};
    pool.ParallelFor(2, [&](int64_t) {
      running.fetch_add(1);
      while (running.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(running.load(), 2);
  }
}

// A helper that is late makes the caller park, not fail.
TEST(ThreadPoolTest, CallerWaitsForASlowHelper) {
  ThreadPool pool(2);
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> helper_in{false}, helper_out{false};
  pool.ParallelFor(2, [&](int64_t) {
    if (std::this_thread::get_id() == caller) {
      while (!helper_in.load()) std::this_thread::yield();
      return;
    }
    helper_in = true;
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(5);
    while (std::chrono::steady_clock::now() < until) std::this_thread::yield();
    helper_out = true;
  });
  EXPECT_TRUE(helper_out.load());
}

TEST(ThreadPoolTest, HelpersFlushDenormals) {
  ThreadPool pool(2);
  std::atomic<int> running{0};
  bool flushed[2] = {};
  pool.ParallelFor(2, [&](int64_t i) {
    running.fetch_add(1);
    while (running.load() < 2) std::this_thread::yield();  // one index per thread
    volatile float tiny = std::numeric_limits<float>::min();
    flushed[i] = tiny * 0.5f == 0.0f;
  });
  EXPECT_TRUE(flushed[0]);
  EXPECT_TRUE(flushed[1]);
}

TEST(ThreadPoolTest, AwaitEndsWhenWokenOrLate) {
  for (int threads : {1, 2}) {
    ThreadPool pool(threads);
    std::atomic<bool> ready{false};
    const auto is_ready = [&] { return ready.load(); };
    EXPECT_FALSE(pool.Await(&ready, is_ready, std::chrono::steady_clock::now()));
    const auto soon = std::chrono::steady_clock::now() + std::chrono::milliseconds(2);
    EXPECT_FALSE(pool.Await(&ready, is_ready, soon));
    EXPECT_GE(std::chrono::steady_clock::now(), soon);
    std::thread waker([&] {
      ready = true;
      pool.Wake(&ready);
    });
    EXPECT_TRUE(pool.Await(&ready, is_ready));
    waker.join();
  }
}

// Others' jobs do not keep it beyond its deadline.
TEST(ThreadPoolTest, AwaitIsNotLateForWork) {
  ThreadPool pool(2);
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop.load()) pool.ParallelFor(4, [](int64_t) { CpuRelax(); });
  });
  const auto soon = std::chrono::steady_clock::now() + std::chrono::milliseconds(5);
  EXPECT_FALSE(pool.Await(
      &stop, [] { return false; }, soon));
  stop = true;
  busy.join();
}

// Two owners hand one token to and fro, at paces at which both spinning and sleeping ones are met.
TEST(ThreadPoolTest, NoWakeIsLost) {
  ThreadPool pool(2);
  std::atomic<int> token{0};
  constexpr int kRounds = 3000;
  const auto play = [&](int self) {
    const ThreadPool::Owner owner(&pool);
    for (int round = self; round < kRounds; round += 2) {
      pool.Await(&token, [&] { return token.load() == round; });
      const auto until =
          std::chrono::steady_clock::now() + std::chrono::microseconds(round % 5 == 0 ? 60 : 0);
      while (std::chrono::steady_clock::now() < until) std::this_thread::yield();
      token = round + 1;
      pool.Wake(&token);
    }
  };
  std::thread other([&] { play(1); });
  play(0);
  other.join();
  EXPECT_EQ(token.load(), kRounds);
}

// The caller cannot finish alone. Whoever sleeps is asked, the owner rather than the helper.
TEST(ThreadPoolTest, WhoWaitsHelpsWhoComputes) {
  ThreadPool pool(2);
  std::atomic<bool> stop{false};
  std::thread waiting([&] {
    const ThreadPool::Owner owner(&pool);
    pool.Await(&stop, [&] { return stop.load(); });
  });
  const auto waiting_id = waiting.get_id();
  std::atomic<bool> helped{false};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!helped.load() && std::chrono::steady_clock::now() < deadline) {
    Pause();
    std::atomic<int> running{0};
    pool.ParallelFor(2, [&](int64_t) {
      if (std::this_thread::get_id() == waiting_id) helped = true;
      running.fetch_add(1);
      while (running.load() < 2) std::this_thread::yield();
    });
  }
  EXPECT_TRUE(helped.load());
  stop = true;
  pool.Wake(&stop);
  waiting.join();
}

// An owner that sleeps elsewhere does not keep helpers from being woken.
TEST(ThreadPoolTest, BlockedOwnersDoNotCount) {
  ThreadPool pool(2);
  std::atomic<bool> blocked{false}, stop{false};
  std::thread elsewhere([&] {
    const ThreadPool::Owner owner(&pool);
    const ThreadPool::Blocked sleeps(&pool);
    blocked = true;
    stop.wait(false);
  });
  while (!blocked.load()) std::this_thread::yield();
  Pause();  // the helper goes to sleep
  std::atomic<int> running{0};
  std::atomic<bool> together{false};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  pool.ParallelFor(2, [&](int64_t) {
    running.fetch_add(1);
    while (running.load() < 2 && std::chrono::steady_clock::now() < deadline)
      std::this_thread::yield();
    if (std::chrono::steady_clock::now() < deadline) together = true;
  });
  EXPECT_TRUE(together.load());
  stop = true;
  stop.notify_one();
  elsewhere.join();
}

TEST(BandwidthProbeTest, GivesAPlausibleRate) {
  ThreadPool pool(2);
  const double rate = ProbeReadBandwidth(&pool, size_t{8} << 20, 3);
  EXPECT_TRUE(std::isfinite(rate));
  EXPECT_GT(rate, 0.01);
}

}  // namespace
}  // namespace switchyard
