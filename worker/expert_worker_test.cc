// The expert role against a hand-written attention rank: right messages are answered, wrong ones
// are errors that name the rank, and nothing waits for ever.
#include "worker/expert_worker.h"

#include <array>
#include <chrono>
#include <cmath>
#include <cstring>

#include "comm/test_problems.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

constexpr int64_t kHidden = 8;
constexpr int64_t kWidth = 4;
constexpr int32_t kExperts = 3;
constexpr ExchangeShape kShape = {
    .row_bytes = kHidden * sizeof(float), .num_experts = kExperts, .top_k = 2, .max_rows = 4};

class ExpertWorkerTest : public testing::Test {
 protected:
  explicit ExpertWorkerTest(int32_t num_ranks = 1)
      : communicators_(MakeInProcessCommunicators(1 + num_ranks, &pool_)) {
    placement_ = std::make_shared<ExpertPlacement>(ExpertPlacement::Even(1, kExperts, num_ranks));
    std::string error;
    const std::unique_ptr<ComputeBackend> backend = MakeCpuBackend(&pool_, "auto", &error);
    auto weights = std::make_shared<ExpertWeights>();
    weights->experts.emplace_back();
    std::array<float, kWidth * kHidden> ones;
    ones.fill(0.25f);
    for (int32_t e = 0; e < kExperts; ++e) {
      Tensor up(ones.data(), DType::kF32, {kWidth, kHidden});
      Tensor down(ones.data(), DType::kF32, {kHidden, kWidth});
      weights->experts[0].push_back(
          std::make_shared<MlpWeights>(backend->PackMlp(up, up, down, FormatOf(up.dtype))));
      for (float& w : ones) w *= -2.0f;
    }
    backend->Synchronize();
    std::vector<std::unique_ptr<ExpertRank>> ranks;
    for (int32_t e = 0; e < num_ranks; ++e) {
      ranks.push_back(std::make_unique<ExpertRank>(
          ExpertRankOptions{.expert_rank = e,
                            .num_moe_layers = 1,
                            .hidden = kHidden,
                            .slot_formats = {},
                            .exchange = kShape,
                            .ranks = {.num_attention = 1, .num_experts = num_ranks},
                            .planner = {},
                            .counters = std::make_shared<WorkerCounters>(kExperts)},
          weights, placement_, MakeCpuBackend(&pool_, "auto", &error), &pool_,
          communicators_[static_cast<size_t>(1 + e)].get()));
    }
    worker_ = std::make_unique<ExpertWorker>(std::move(ranks), &pool_,
                                             [this](const absl::Status& status) {
                                               MutexLock lock(mu_);
                                               failure_ = status;
                                               for (auto& communicator : communicators_)
                                                 communicator->Abort(status);
                                               changed_.NotifyAll();
                                             });
    rows_.fill(1.0f);
    step_.step = 7;
    step_.participants = {0};
  }
  ~ExpertWorkerTest() override {
    for (auto& communicator : communicators_) communicator->Abort(absl::CancelledError("end"));
  }

  // The dispatch message of two tokens, each with experts (0, 2), as `header` would have it.
  std::vector<std::byte> Message(const StepHeader& header, int32_t layer = 0,
                                 int32_t micro_batch = 0, int32_t expert_rank = 0) {
    const std::array<int32_t, 4> ids = {0, 2, 2, 0};
    std::vector<int32_t> counts(kExperts);
    CountExperts(ids, counts);
    plan_ = PlanOnce(counts, 1, *placement_, 0);
    BuildDispatchLists(ids, kShape.top_k, plan_, 0, kShape.row_bytes, &lists_);
    std::vector<std::byte> message(MaxDispatchBytes(kShape));
    message.resize(WriteDispatch({.step = &header, .layer = layer, .micro_batch = micro_batch},
                                 plan_, 0, expert_rank, lists_,
                                 reinterpret_cast<const std::byte*>(rows_.data()), kShape.row_bytes,
                                 counts, message));
    return message;
  }

  // Sends a message as rank 0 and waits for the answer.
  absl::Status Exchange(const std::vector<std::byte>& message) {
    received_.resize(static_cast<size_t>(MaxCombineRows(kShape, 1)) * kHidden);
    const MessageTag dispatch{step_.step, 0, 0, MessageKind::kDispatch};
    const MessageTag combine{step_.step, 0, 0, MessageKind::kCombine};
    const SendOp send{1, dispatch, message};
    RecvOp recv{1, combine, std::as_writable_bytes(std::span(received_)), 0};
    worker_->Execute(step_);
    absl::Status status = communicators_[0]->Start({&send, 1}, {&recv, 1});
    if (status.ok())
      status = communicators_[0]->Wait(std::chrono::steady_clock::now() + std::chrono::seconds(60));
    received_bytes_ = recv.received;
    return status;
  }

  std::string FailureOf(const std::vector<std::byte>& message) {
    EXPECT_FALSE(Exchange(message).ok());
    MutexLock lock(mu_);
    while (failure_.ok()) changed_.Wait(mu_);
    return std::string(failure_.message());
  }

  ThreadPool pool_{2};
  std::vector<std::unique_ptr<Communicator>> communicators_;
  std::shared_ptr<const ExpertPlacement> placement_;
  StepHeader step_;
  DispatchPlan plan_;
  DispatchLists lists_;
  std::array<float, 4 * kHidden> rows_;
  std::vector<float> received_;
  size_t received_bytes_ = 0;
  Mutex mu_;
  CondVar changed_;
  absl::Status failure_ SY_GUARDED_BY(mu_);
  std::unique_ptr<ExpertWorker> worker_;  // first to go
};

TEST_F(ExpertWorkerTest, AnswersOneRowPerTokenAndExpert) {
  ASSERT_TRUE(Exchange(Message(step_)).ok());
  ASSERT_TRUE(CheckCombine(std::as_bytes(std::span(received_)).first(received_bytes_),
                           {.step = &step_, .layer = 0, .micro_batch = 0}, plan_, 0, 0,
                           kShape.row_bytes)
                  .ok());
  // gate = up = 8 * w, out = sum of kWidth products with w: silu(8w) * 8w * 4w.
  const auto expected = [](double w) { return 8 * w / (1 + std::exp(-8 * w)) * 8 * w * 4 * w; };
  const std::array<double, 4> weight_of = {0.25, 1.0, 1.0, 0.25};  // experts 0, 2, 2, 0
  for (size_t i = 0; i < 4; ++i) {
    const float* row = received_.data() + static_cast<size_t>(lists_.row_of[i]) * kHidden;
    for (int64_t h = 0; h < kHidden; ++h) EXPECT_NEAR(row[h], expected(weight_of[i]), 1e-4) << i;
  }
}

TEST_F(ExpertWorkerTest, AnotherEpochIsAnErrorThatNamesTheRank) {
  StepHeader other = step_;
  other.epoch = 5;
  EXPECT_THAT(FailureOf(Message(other)),
              testing::AllOf(HasSubstr("attention rank 0"), HasSubstr("epoch 5")));
}

TEST_F(ExpertWorkerTest, AnotherStepOrLayerIsAnError) {
  StepHeader other = step_;
  other.step = 8;
  EXPECT_THAT(FailureOf(Message(other)), HasSubstr("step 8, expected 7"));
}

TEST_F(ExpertWorkerTest, AnotherPlanIsAnError) {
  std::vector<std::byte> message = Message(step_);
  int32_t one =
      1;  // the folded counts stand at the end: one copy less of the last expert gives another plan
  std::memcpy(message.data() + message.size() - sizeof(one), &one, sizeof(one));
  EXPECT_THAT(FailureOf(message), HasSubstr("plan_hash"));
}

TEST_F(ExpertWorkerTest, ATruncatedMessageIsAnError) {
  std::vector<std::byte> message = Message(step_);
  message.resize(40);
  EXPECT_THAT(FailureOf(message), HasSubstr("bytes 40"));
}

TEST_F(ExpertWorkerTest, AStepWithUnknownParticipantsIsAnError) {
  step_.participants = {0, 1};
  EXPECT_THAT(FailureOf(Message(step_)), HasSubstr("participant 1 after 0 of 1 attention ranks"));
}

TEST_F(ExpertWorkerTest, MoreThanTwoMicroBatchesAreAnError) {
  step_.micro_batches = 3;
  EXPECT_THAT(FailureOf(Message(step_)), HasSubstr("3 micro-batches, not 1 to 2"));
}

TEST_F(ExpertWorkerTest, AMessageOfAStepWithAnotherNumberOfMicroBatchesIsAnError) {
  StepHeader other = step_;
  step_.micro_batches = 2;
  EXPECT_THAT(FailureOf(Message(other)), HasSubstr("participants_hash"));
}

// The second micro-batch's rows may come first; it has at most half of the rows.
TEST_F(ExpertWorkerTest, TwoMicroBatchesAreAnsweredInOrder) {
  step_.micro_batches = 2;
  const std::array<std::vector<std::byte>, 2> messages = {Message(step_, 0, 0),
                                                          Message(step_, 0, 1)};
  std::array<std::vector<float>, 2> received;
  std::array<RecvOp, 2> recvs;
  worker_->Execute(step_);
  for (int32_t m : {1, 0}) {
    const size_t i = static_cast<size_t>(m);
    received[i].resize(static_cast<size_t>(MaxCombineRows(kShape, 1)) * kHidden);
    recvs[i] = {1,
                {step_.step, 0, m, MessageKind::kCombine},
                std::as_writable_bytes(std::span(received[i]))};
    const SendOp send{1, {step_.step, 0, m, MessageKind::kDispatch}, messages[i]};
    ASSERT_TRUE(communicators_[0]->Start(m, {&send, 1}, {&recvs[i], 1}).ok());
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  for (int32_t m : {0, 1}) {
    const size_t i = static_cast<size_t>(m);
    ASSERT_TRUE(communicators_[0]->Wait(m, deadline).ok());
    const absl::Status status =
        CheckCombine(std::as_bytes(std::span(received[i])).first(recvs[i].received),
                     {.step = &step_, .layer = 0, .micro_batch = m}, plan_, 0, 0, kShape.row_bytes);
    EXPECT_TRUE(status.ok()) << status;
  }
  const size_t first_row = static_cast<size_t>(HeaderRows(kShape.row_bytes)) * kHidden;
  EXPECT_EQ(std::memcmp(&received[0][first_row], &received[1][first_row],
                        recvs[0].received - first_row * sizeof(float)),
            0);
}

// Two expert ranks that share the worker's thread.
class TwoExpertRanksTest : public ExpertWorkerTest {
 protected:
  TwoExpertRanksTest() : ExpertWorkerTest(2) {}

  // Sends both messages as rank 0 and waits for both answers.
  absl::Status ExchangeBoth(const std::array<std::vector<std::byte>, 2>& messages) {
    std::vector<SendOp> sends;
    for (int32_t e : {0, 1}) {
      const size_t i = static_cast<size_t>(e);
      answers_[i].resize(static_cast<size_t>(MaxCombineRows(kShape, 1)) * kHidden);
      sends.push_back({1 + e, {step_.step, 0, 0, MessageKind::kDispatch}, messages[i]});
      recvs_[i] = {1 + e,
                   {step_.step, 0, 0, MessageKind::kCombine},
                   std::as_writable_bytes(std::span(answers_[i]))};
    }
    worker_->Execute(step_);
    absl::Status status = communicators_[0]->Start(sends, recvs_);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    return status.ok() ? communicators_[0]->Wait(deadline) : status;
  }

  std::array<std::vector<float>, 2> answers_;
  std::array<RecvOp, 2> recvs_;
};

TEST_F(TwoExpertRanksTest, BothAreAnswered) {
  ASSERT_TRUE(ExchangeBoth({Message(step_, 0, 0, 0), Message(step_, 0, 0, 1)}).ok());
  for (int32_t e : {0, 1}) {
    const RecvOp& recv = recvs_[static_cast<size_t>(e)];
    EXPECT_TRUE(CheckCombine(recv.buffer.first(recv.received),
                             {.step = &step_, .layer = 0, .micro_batch = 0}, plan_, 0, e,
                             kShape.row_bytes)
                    .ok());
  }
}

// The first has computed its rows when the second finds its message wrong: nobody is answered, and
// nobody waits for ever.
TEST_F(TwoExpertRanksTest, OneThatFailsEndsBoth) {
  std::array<std::vector<std::byte>, 2> messages = {Message(step_, 0, 0, 0),
                                                    Message(step_, 0, 0, 1)};
  messages[1].resize(40);
  EXPECT_FALSE(ExchangeBoth(messages).ok());
  EXPECT_EQ(recvs_[0].received, 0u);
  MutexLock lock(mu_);
  while (failure_.ok()) changed_.Wait(mu_);
  EXPECT_THAT(std::string(failure_.message()),
              testing::AllOf(HasSubstr("expert rank 1"), HasSubstr("bytes 40")));
}

TEST_F(ExpertWorkerTest, AbortEndsTheWait) {
  worker_->Execute(step_);
  communicators_[1]->Abort(absl::UnavailableError("rank 0 died"));
  MutexLock lock(mu_);
  while (failure_.ok()) changed_.Wait(mu_);
  EXPECT_THAT(std::string(failure_.message()), HasSubstr("rank 0 died"));
}

}  // namespace
}  // namespace switchyard
