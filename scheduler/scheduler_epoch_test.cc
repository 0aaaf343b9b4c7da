// The Scheduler's thread and the events of a control plane: pauses, lost
// epochs, no workers at all.
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <thread>

#include "kernels/check.h"
#include "kernels/mutex.h"
#include "scheduler/fake_worker.h"
#include "scheduler/scheduler.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

ModelInfo MakeModel() {
  ModelInfo model;
  model.vocab_size = 100;
  model.max_model_len = 120;
  model.block_size = 4;
  model.num_kv_blocks = 60;
  return model;
}

// Keeps what the scheduler sends until the test asks for it.
class ManualClient : public WorkerClient {
 public:
  uint64_t progress() const override { return 0; }
  void SetEventCallback(std::function<void(WorkerEvent)> on_event) override {
    on_event_ = std::move(on_event);
  }
  void Execute(int32_t rank, StepPlan plan) override {
    MutexLock lock(mu_);
    plans_.emplace_back(rank, std::move(plan));
    changed_.NotifyAll();
  }
  void Paused(uint64_t epoch) override {
    MutexLock lock(mu_);
    paused_ = epoch;
    changed_.NotifyAll();
  }

  void Send(WorkerEvent event) { on_event_(std::move(event)); }
  // The next plan; CHECKs that it comes.
  std::pair<int32_t, StepPlan> Next() {
    MutexLock lock(mu_);
    while (plans_.empty()) SY_CHECK(changed_.WaitUntil(mu_, Deadline()));
    auto next = std::move(plans_.front());
    plans_.erase(plans_.begin());
    return next;
  }
  uint64_t WaitPaused() {
    MutexLock lock(mu_);
    while (!paused_) SY_CHECK(changed_.WaitUntil(mu_, Deadline()));
    return *std::exchange(paused_, std::nullopt);
  }
  bool quiet() {
    MutexLock lock(mu_);
    return plans_.empty() && !paused_;
  }

 private:
  static Clock::time_point Deadline() { return Clock::now() + std::chrono::seconds(20); }

  std::function<void(WorkerEvent)> on_event_;
  Mutex mu_;
  CondVar changed_;
  std::vector<std::pair<int32_t, StepPlan>> plans_ SY_GUARDED_BY(mu_);
  std::optional<uint64_t> paused_ SY_GUARDED_BY(mu_);
};

class SchedulerEpochTest : public testing::Test {
 protected:
  // One step at a time: the tests say what happens after which.
  SchedulerEpochTest() : scheduler_({.max_steps_in_flight = 1}, model_, &client_) {
    spdlog::set_level(spdlog::level::off);
    scheduler_.Start();
  }

  struct Reply {
    Mutex mu;
    CondVar changed;
    std::vector<int32_t> tokens SY_GUARDED_BY(mu);
    std::optional<ChoiceEvent> end SY_GUARDED_BY(mu);
    ChoiceEvent Wait() {
      MutexLock lock(mu);
      while (!end) SY_CHECK(changed.WaitUntil(mu, Clock::now() + std::chrono::seconds(20)));
      return *end;
    }
  };

  absl::StatusOr<std::shared_ptr<Reply>> Submit(int32_t first) {
    auto reply = std::make_shared<Reply>();
    request_.prompt = {first, 2, 3, 4, 5};
    request_.choices.resize(1);
    request_.max_tokens = 4;
    request_.sink = [reply](std::vector<ChoiceEvent> events) {
      MutexLock lock(reply->mu);
      for (ChoiceEvent& event : events) {
        reply->tokens.insert(reply->tokens.end(), event.tokens.begin(), event.tokens.end());
        if (event.finished) reply->end = std::move(event);
      }
      reply->changed.NotifyAll();
    };
    const auto id = scheduler_.Submit(request_);
    if (!id.ok()) return id.status();
    return reply;
  }
  // Waits for what no one announces.
  bool Eventually(const std::function<bool(const SchedulerStats&)>& condition) {
    const Clock::time_point deadline = Clock::now() + std::chrono::seconds(20);
    while (!condition(scheduler_.Stats())) {
      if (Clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }
  EpochView View(uint64_t epoch, uint64_t worker) {
    return {.epoch = epoch, .attention = {{worker, model_.num_kv_blocks}}};
  }
  // Runs steps on `worker` until the reply has ended.
  void Serve(FakeWorker* worker, Reply& reply) {
    for (int32_t step = 0; step < 4; ++step) {
      client_.Send(worker->Run(client_.Next().second));
    }
    EXPECT_EQ(reply.Wait().reason, FinishReason::kLength);
    const ExpectedChoice expected =
        Expect(request_.prompt, request_.choices[0], {}, 9, model_.vocab_size);
    MutexLock lock(reply.mu);
    EXPECT_EQ(reply.tokens, expected.tokens);
  }

  const ModelInfo model_ = MakeModel();
  ManualClient client_;
  Request request_;
  Scheduler scheduler_;
};

TEST_F(SchedulerEpochTest, RequestsWaitForAnEpochThenRun) {
  const auto reply = Submit(1);
  ASSERT_TRUE(reply.ok());
  EXPECT_TRUE(Eventually([](const SchedulerStats& s) { return s.waiting == 1; }));
  EXPECT_TRUE(client_.quiet());
  EXPECT_EQ(scheduler_.Stats().epoch, 0u);
  client_.Send(View(1, 1));
  FakeWorker worker(model_, 0);
  Serve(&worker, **reply);
  EXPECT_EQ(scheduler_.Stats().epoch, 1u);
}

TEST_F(SchedulerEpochTest, APauseIsAcknowledgedAfterTheStep) {
  client_.Send(View(1, 1));
  const auto reply = Submit(1);
  ASSERT_TRUE(reply.ok());
  FakeWorker worker(model_, 0);
  const auto first = client_.Next();
  client_.Send(EpochPause{1});
  client_.Send(worker.Run(first.second));
  EXPECT_EQ(client_.WaitPaused(), 1u);
  EXPECT_TRUE(client_.quiet());
  client_.Send(View(2, 2));  // the worker left
  FakeWorker other(model_, 0);
  other.Install(2, 0, false);
  for (int32_t step = 0; step < 3; ++step) client_.Send(other.Run(client_.Next().second));
  EXPECT_EQ((*reply)->Wait().reason, FinishReason::kLength);
  EXPECT_TRUE(Eventually([](const SchedulerStats& s) { return s.moved_sequences == 1; }));
  // Idle: at once.
  client_.Send(EpochPause{2});
  EXPECT_EQ(client_.WaitPaused(), 2u);
}

TEST_F(SchedulerEpochTest, ALostStepRunsAgainInTheNextEpoch) {
  client_.Send(View(1, 1));
  const auto reply = Submit(1);
  ASSERT_TRUE(reply.ok());
  client_.Next();
  client_.Send(EpochEnd{.epoch = 1, .lost_attention = {1}, .expert_lost = false});
  EXPECT_TRUE(Eventually([](const SchedulerStats& s) { return s.lost_steps == 1; }));
  client_.Send(View(5, 2));
  FakeWorker worker(model_, 0);
  worker.Install(5, 0, false);
  Serve(&worker, **reply);
}

TEST_F(SchedulerEpochTest, UnavailableEndsWhatWaitsAndRefusesUntilThereAreWorkers) {
  const auto reply = Submit(1);
  ASSERT_TRUE(reply.ok());
  client_.Send(Unavailable{absl::UnavailableError("no worker for 60 s")});
  EXPECT_EQ((*reply)->Wait().error, absl::UnavailableError("no worker for 60 s"));
  EXPECT_TRUE(Eventually([](const SchedulerStats& s) { return s.unavailable; }));
  EXPECT_EQ(Submit(2).status(), absl::UnavailableError("no worker for 60 s"));
  client_.Send(View(1, 1));
  EXPECT_TRUE(Eventually([](const SchedulerStats& s) { return !s.unavailable; }));
  const auto next = Submit(3);
  ASSERT_TRUE(next.ok()) << next.status();
  FakeWorker worker(model_, 0);
  Serve(&worker, **next);
}

TEST_F(SchedulerEpochTest, DrainWaitsForAnEpochOrForItsEnd) {
  const auto reply = Submit(1);
  ASSERT_TRUE(reply.ok());
  std::atomic<bool> drained = false;
  scheduler_.Drain([&] { drained = true; });
  EXPECT_TRUE(Eventually([](const SchedulerStats& s) { return s.waiting == 1; }));
  EXPECT_FALSE(drained);
  client_.Send(Unavailable{absl::UnavailableError("no worker for 60 s")});
  EXPECT_EQ((*reply)->Wait().reason, FinishReason::kError);
  EXPECT_TRUE(Eventually([&](const SchedulerStats&) { return drained.load(); }));
}

TEST_F(SchedulerEpochTest, DrainEndsWithAnEpoch) {
  const auto reply = Submit(1);
  ASSERT_TRUE(reply.ok());
  std::atomic<bool> drained = false;
  scheduler_.Drain([&] { drained = true; });
  client_.Send(View(1, 1));
  FakeWorker worker(model_, 0);
  Serve(&worker, **reply);
  EXPECT_TRUE(Eventually([&](const SchedulerStats&) { return drained.load(); }));
}

}  // namespace
}  // namespace switchyard
