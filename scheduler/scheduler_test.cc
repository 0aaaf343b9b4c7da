// The Scheduler with its thread, over fake workers with threads of their own.
#include "scheduler/scheduler.h"

#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <thread>

#include "kernels/mutex.h"
#include "scheduler/fake_worker.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

// Waits for a condition that no one announces; false after 20 s.
bool Eventually(const std::function<bool()>& condition) {
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

ModelInfo MakeModel() {
  ModelInfo model;
  model.vocab_size = 100;
  model.max_model_len = 120;
  model.block_size = 4;
  model.num_kv_blocks = 60;
  return model;
}

// Each worker is a FakeWorker with a thread and a queue.
class ThreadedClient : public WorkerClient {
 public:
  enum class Mode { kWork, kHang, kFail };
  ThreadedClient(const ModelInfo& model, int32_t num_workers, Mode mode = Mode::kWork)
      : first_epoch_(FirstEpoch(model, num_workers)), mode_(mode) {
    for (int32_t i = 0; i < num_workers; ++i) lanes_.push_back(std::make_unique<Lane>(model, i));
    for (auto& lane : lanes_) lane->thread = std::thread([this, lane = lane.get()] { Run(*lane); });
  }
  ~ThreadedClient() override {
    for (auto& lane : lanes_) {
      MutexLock lock(lane->mu);
      lane->stop = true;
      lane->changed.NotifyOne();
    }
    for (auto& lane : lanes_) lane->thread.join();
  }

  uint64_t progress() const override { return 0; }
  void SetEventCallback(std::function<void(WorkerEvent)> on_event) override {
    on_event_ = std::move(on_event);
    on_event_(first_epoch_);
  }
  void Paused(uint64_t) override {}
  void Execute(int32_t worker, StepPlan plan) override {
    Lane& lane = *lanes_.at(worker);
    ++num_plans;
    MutexLock lock(lane.mu);
    lane.plans.push_back(std::move(plan));
    lane.changed.NotifyOne();
  }
  // A result that nobody waits for.
  void SendStale() { on_event_(StepResult{1, 1, 0, "", false, {}}); }

  std::atomic<int32_t> num_plans = 0;

 private:
  struct Lane {
    Lane(const ModelInfo& model, int32_t index) : index(index), worker(model, index) {}
    const int32_t index;
    FakeWorker worker;  // its thread only
    Mutex mu;
    CondVar changed;
    std::deque<StepPlan> plans SY_GUARDED_BY(mu);
    bool stop SY_GUARDED_BY(mu) = false;
    std::thread thread;
  };

  std::optional<StepPlan> Next(Lane& lane) {
    MutexLock lock(lane.mu);
    while (lane.plans.empty() && !lane.stop) lane.changed.Wait(lane.mu);
    if (lane.stop) return std::nullopt;
    StepPlan plan = std::move(lane.plans.front());
    lane.plans.pop_front();
    return plan;
  }
  void Run(Lane& lane) {
    while (std::optional<StepPlan> plan = Next(lane)) {
      if (mode_ == Mode::kHang) continue;
      StepResult result = lane.worker.Run(*plan);
      if (mode_ == Mode::kFail) result.error = "broken";
      on_event_(std::move(result));
    }
  }

  const EpochView first_epoch_;
  const Mode mode_;
  std::function<void(WorkerEvent)> on_event_;  // set before the first Execute
  std::vector<std::unique_ptr<Lane>> lanes_;
};

// Collects the events of one request. Its sink keeps it alive.
struct Stream : std::enable_shared_from_this<Stream> {
  Mutex mu;
  CondVar changed;
  std::map<int32_t, std::vector<int32_t>> tokens SY_GUARDED_BY(mu);
  std::map<int32_t, ChoiceEvent> ended SY_GUARDED_BY(mu);
  bool again SY_GUARDED_BY(mu) = false;  // an event after the end

  EventSink Sink() {
    return [self = shared_from_this()](std::vector<ChoiceEvent> events) {
      self->Receive(std::move(events));
    };
  }
  void Receive(std::vector<ChoiceEvent> events) {
    MutexLock lock(mu);
    for (ChoiceEvent& event : events) {
      again |= ended.contains(event.choice);
      auto& all = tokens[event.choice];
      all.insert(all.end(), event.tokens.begin(), event.tokens.end());
      if (event.finished) ended[event.choice] = std::move(event);
    }
    changed.NotifyAll();
  }
  // True when all choices have ended within 20 s.
  bool Wait(size_t num_choices) {
    const Clock::time_point deadline = Clock::now() + std::chrono::seconds(20);
    MutexLock lock(mu);
    while (ended.size() < num_choices) {
      if (!changed.WaitUntil(mu, deadline)) return false;
    }
    return !again;
  }
  ChoiceEvent End(int32_t choice = 0) {
    MutexLock lock(mu);
    return ended[choice];
  }
};

Request MakeRequest(Stream& stream, int32_t first, int32_t length, int32_t max_tokens,
                    int32_t n = 1) {
  Request request;
  for (int32_t i = 0; i < length; ++i) request.prompt.push_back((first + i * i) % 100);
  request.max_tokens = max_tokens;
  for (int32_t i = 0; i < n; ++i) {
    SamplingParams sampling;
    sampling.seed = static_cast<uint64_t>(first);
    sampling.choice = i;
    request.choices.push_back(sampling);
  }
  request.sink = stream.Sink();
  return request;
}

class SchedulerTest : public testing::Test {
 protected:
  SchedulerTest() { spdlog::set_level(spdlog::level::off); }
};

TEST_F(SchedulerTest, ManyThreadsSubmitAndCancel) {
  constexpr int32_t kThreads = 4, kRequests = 60;
  const ModelInfo model = MakeModel();
  ThreadedClient client(model, 3);
  SchedulerOptions options;
  options.max_num_seqs = 12;
  options.max_num_batched_tokens = 40;
  Scheduler scheduler(options, model, &client);
  std::atomic<int64_t> observed = 0;
  scheduler.SetStepObserver([&](const StepObservation& o) { observed += o.tokens; });
  scheduler.Start();
  std::vector<std::thread> threads;
  for (int32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      for (int32_t i = 0; i < kRequests; ++i) {
        const auto stream = std::make_shared<Stream>();
        const int32_t n = 1 + static_cast<int32_t>(random() % 3);
        Request request = MakeRequest(*stream, static_cast<int32_t>(random() % 5),
                                      1 + static_cast<int32_t>(random() % 50),
                                      1 + static_cast<int32_t>(random() % 30), n);
        const Request copy = request;
        const auto id = scheduler.Submit(std::move(request));
        ASSERT_TRUE(id.ok()) << id.status();
        const uint64_t fate = random() % 4;
        if (fate == 0) {
          scheduler.Cancel(*id);
          continue;
        }
        if (fate == 1 && n > 1) {
          scheduler.CancelChoice(*id, n - 1);
          ASSERT_TRUE(stream->Wait(n - 1));
        } else {
          ASSERT_TRUE(stream->Wait(n));
        }
        const ExpectedChoice expected =
            Expect(copy.prompt, copy.choices[0], {},
                   static_cast<int32_t>(copy.prompt.size()) + copy.max_tokens, 100);
        MutexLock lock(stream->mu);
        EXPECT_EQ(stream->tokens[0], expected.tokens);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::atomic<bool> drained = false;
  scheduler.Drain([&] { drained = true; });
  EXPECT_EQ(scheduler.Submit(MakeRequest(*std::make_shared<Stream>(), 1, 3, 3)).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_TRUE(Eventually([&] { return drained.load(); }));
  EXPECT_TRUE(Eventually([&] { return scheduler.Stats().kv_usage == 0; }));
  const SchedulerStats stats = scheduler.Stats();
  EXPECT_EQ(stats.running, 0);
  EXPECT_EQ(stats.waiting, 0);
  EXPECT_GT(stats.steps, 100u);
  EXPECT_EQ(static_cast<uint64_t>(observed.load()), stats.batched_tokens);
}

TEST_F(SchedulerTest, TheQueueIsBoundedInRequestsAndTokens) {
  const ModelInfo model = MakeModel();
  ThreadedClient client(model, 1);
  SchedulerOptions options;
  options.max_queued_requests = 3;
  options.max_queued_tokens = 60;
  Scheduler scheduler(options, model, &client);  // not started: everything waits
  const auto stream = std::make_shared<Stream>();
  EXPECT_TRUE(scheduler.Submit(MakeRequest(*stream, 1, 70, 1)).ok());  // alone in the queue
  absl::Status status = scheduler.Submit(MakeRequest(*stream, 1, 10, 1)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(),
            "the queue is full: 70 prompt tokens wait, with 10 more the limit of 60 is exceeded");
  scheduler.Start();
  EXPECT_TRUE(Eventually([&] { return scheduler.Stats().steps > 0; }));
  for (int32_t i = 0; i < 20; ++i) {  // there is room again
    const auto next = std::make_shared<Stream>();
    ASSERT_TRUE(scheduler.Submit(MakeRequest(*next, 1, 50, 2)).ok());
    ASSERT_TRUE(next->Wait(1));
  }
  status = scheduler.Submit(MakeRequest(*stream, 1, 120, 1)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SchedulerTest, EveryChoiceCountsItsPrompt) {
  const ModelInfo model = MakeModel();
  ThreadedClient client(model, 1);
  SchedulerOptions options;
  options.max_queued_tokens = 60;
  Scheduler scheduler(options, model, &client);  // not started: everything waits
  const auto stream = std::make_shared<Stream>();
  EXPECT_TRUE(scheduler.Submit(MakeRequest(*stream, 1, 10, 1, 4)).ok());
  const absl::Status status = scheduler.Submit(MakeRequest(*stream, 1, 10, 1, 4)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(),
            "the queue is full: 40 prompt tokens wait, with 40 more the limit of 60 is exceeded");
}

TEST_F(SchedulerTest, RefusesWhenTheQueueHasTooManyRequests) {
  const ModelInfo model = MakeModel();
  ThreadedClient client(model, 1);
  SchedulerOptions options;
  options.max_queued_requests = 2;
  const auto stream = std::make_shared<Stream>(), other = std::make_shared<Stream>();
  {
    Scheduler scheduler(options, model, &client);
    EXPECT_TRUE(scheduler.Submit(MakeRequest(*stream, 1, 5, 1)).ok());
    EXPECT_TRUE(scheduler.Submit(MakeRequest(*other, 1, 5, 1)).ok());
    const absl::Status status = scheduler.Submit(MakeRequest(*stream, 1, 5, 1)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(status.message(), "the queue is full: 2 requests wait, the limit is 2");
  }
  // Never started, yet what was accepted has ended.
  EXPECT_EQ(stream->End().error.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(other->End().reason, FinishReason::kError);
}

TEST_F(SchedulerTest, TheHeartbeatGoesOnWhenIdle) {
  const ModelInfo model = MakeModel();
  ThreadedClient client(model, 1);
  Scheduler scheduler({}, model, &client);
  scheduler.Start();
  const Clock::time_point first = scheduler.Stats().last_progress;
  const Clock::time_point started = Clock::now();
  EXPECT_TRUE(Eventually(
      [&] { return scheduler.Stats().last_progress > first + std::chrono::milliseconds(600); }));
  EXPECT_LT(Clock::now() - started, std::chrono::seconds(10));
  EXPECT_EQ(scheduler.Stats().steps, 0u);
}

TEST_F(SchedulerTest, AHangingWorkerStopsTheHeartbeatButNotTheEnd) {
  const ModelInfo model = MakeModel();
  ThreadedClient client(model, 1, ThreadedClient::Mode::kHang);
  const auto stream = std::make_shared<Stream>(), other = std::make_shared<Stream>();
  std::atomic<bool> drained = false;
  {
    Scheduler scheduler({.max_steps_in_flight = 1}, model, &client);
    scheduler.Start();
    const auto id = scheduler.Submit(MakeRequest(*stream, 1, 5, 1));
    const auto id2 = scheduler.Submit(MakeRequest(*other, 1, 5, 1));
    EXPECT_TRUE(Eventually([&] { return client.num_plans == 1; }));
    EXPECT_TRUE(Eventually([&] {
      const SchedulerStats stats = scheduler.Stats();
      return stats.running + stats.waiting == 2;
    }));
    const Clock::time_point stuck = scheduler.Stats().last_progress;
    scheduler.Cancel(*id);  // is done, though the step is in flight
    EXPECT_TRUE(Eventually([&] {
      const SchedulerStats stats = scheduler.Stats();
      return stats.running + stats.waiting == 1;
    }));
    EXPECT_EQ(scheduler.Stats().last_progress, stuck);
    scheduler.Drain([&] { drained = true; });
  }
  EXPECT_TRUE(drained);
  EXPECT_EQ(stream->End().reason, FinishReason::kNone);
  EXPECT_EQ(other->End().error.code(), absl::StatusCode::kUnavailable);
  client.SendStale();  // the scheduler is gone
}

TEST_F(SchedulerTest, WorkersThatOnlyFailAreGivenUp) {
  const ModelInfo model = MakeModel();
  ThreadedClient client(model, 1, ThreadedClient::Mode::kFail);
  Scheduler scheduler({}, model, &client);
  scheduler.Start();
  const auto first = std::make_shared<Stream>();
  ASSERT_TRUE(scheduler.Submit(MakeRequest(*first, 1, 5, 1)).ok());
  ASSERT_TRUE(first->Wait(1));
  EXPECT_EQ(first->End().error.code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(scheduler.Stats().failed);
  std::vector<std::shared_ptr<Stream>> streams;
  absl::Status status;
  while (status.ok() && streams.size() < 1000) {
    streams.push_back(std::make_shared<Stream>());
    status = scheduler.Submit(MakeRequest(*streams.back(), 1, 5, 1)).status();
    if (status.ok()) {
      ASSERT_TRUE(streams.back()->Wait(1));
    }
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(scheduler.Stats().failed);
}

TEST_F(SchedulerTest, StaleResultsAreCounted) {
  const ModelInfo model = MakeModel();
  ThreadedClient client(model, 1);
  Scheduler scheduler({}, model, &client);
  scheduler.Start();
  client.SendStale();
  EXPECT_TRUE(Eventually([&] { return scheduler.Stats().dropped_results == 1; }));
}

}  // namespace
}  // namespace switchyard
