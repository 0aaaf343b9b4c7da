// Workers whose scheduler is another process, against a scripted scheduler and over the real data
// plane: the bits of LocalCell, through epoch changes, deaths, broken streams and refusals.
#include "worker/worker_process.h"

#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/test_seed.h"
#include "worker/fake_scheduler.h"
#include "worker/remote_cell.h"
#include "worker/test_cases.h"
#include "worker/test_driver.h"

namespace switchyard {
namespace {

using testing::HasSubstr;
using MessageCase = FakeScheduler::Case;
using remote::kAttention;
using remote::kExpert;
using remote::Options;
using remote::Start;

constexpr std::chrono::seconds kLong{60};

class RemoteCellTest : public testing::TestWithParam<std::string> {};

// After every few steps the epoch ends, in half of the cases with a step in flight, and another
// number of expert workers serves another placement.
TEST_P(RemoteCellTest, BitsAreThoseOfOneProcessThroughEpochChanges) {
  std::mt19937 random(TestSeed());
  std::vector<Case> cases;
  const std::vector<TestOutput> expected = Reference(GetParam(), random, &cases);

  RemoteCell cell(GetParam(), 2, 3);
  TestDriver driver(cell.Target());
  cell.scheduler().SetOnResult([&](StepResult result) { driver.OnResult(std::move(result)); });
  const ModelInfo& model = driver.target().model;
  const auto form = [&] {
    std::vector<size_t> experts = {2, 3, 4};
    std::shuffle(experts.begin(), experts.end(), random);
    experts.resize(1 + random() % 3);
    cell.Form(experts, *RandomPlacement(model, static_cast<int32_t>(experts.size()), random));
    driver.BeginEpoch(cell.epoch());
  };
  form();
  int steps = 0;
  const std::vector<TestOutput> got = RunMixed(driver, cases, random, [&] {
    if (++steps % 4 != 0) return;
    if (random() % 2 == 0) {  // a step that nobody will hear of
      driver.Plan(driver.Add(0, RandomTokens(40, model.vocab_size, random), SamplingParams{}), 40);
      driver.Send();
    }
    cell.Stop();
    form();
  });
  ExpectSameBits(expected, got, "");
  EXPECT_GT(cell.epoch(), 2u);
  // What the workers tell of themselves.
  EXPECT_GT(cell.scheduler()
                .ExpectHeartbeat(cell.id(0), [](const v1::Heartbeat& h) { return h.rows() > 0; })
                .progress(),
            0u);
  uint64_t copies = 0;
  for (size_t expert : {2, 3, 4}) {
    copies += cell.scheduler()
                  .ExpectHeartbeat(cell.id(expert), [](const v1::Heartbeat&) { return true; })
                  .rows();
  }
  EXPECT_GT(copies, 0u);
  cell.Stop();
}

INSTANTIATE_TEST_SUITE_P(Families, RemoteCellTest,
                         testing::Values("qwen3_moe", "qwen2_moe", "qwen3_moe_tied_bf16"),
                         [](const auto& info) { return info.param; });

// An expert worker dies with a step in flight; the survivors name it, hold what was its, and the
// sequences go on from what was committed.
TEST(WorkerProcessTest, ADeadPeerEndsTheEpochAndNothingElse) {
  std::mt19937 random(TestSeed());
  std::vector<Case> cases;
  const std::vector<TestOutput> expected = Reference("olmoe", random, &cases);
  RemoteCell cell("olmoe", 1, 2);
  TestDriver driver(cell.Target());
  cell.scheduler().SetOnResult([&](StepResult result) { driver.OnResult(std::move(result)); });
  const ModelInfo& model = driver.target().model;
  const auto even = [&](int32_t ranks) {
    return ExpertPlacement::Even(model.num_moe_layers, model.num_experts, ranks);
  };
  cell.Form({1, 2}, even(2));
  driver.BeginEpoch(cell.epoch());
  int steps = 0;
  const std::vector<TestOutput> got = RunMixed(driver, cases, random, [&] {
    if (++steps != 3) return;
    const uint64_t dead = cell.id(2);
    cell.Kill(2);
    EXPECT_TRUE(cell.scheduler().ExpectEnd(dead));
    driver.Plan(driver.Add(0, {1, 2, 3}, SamplingParams{}), 3);
    driver.Send();
    const v1::WorkerMessage failed = cell.scheduler().Expect(cell.id(0), MessageCase::kEpochFailed);
    EXPECT_EQ(failed.epoch_failed().epoch(), cell.epoch());
    EXPECT_EQ(failed.epoch_failed().suspect_rank(), 2);
    EXPECT_THAT(failed.epoch_failed().error(), HasSubstr("rank 2 is lost"));
    cell.Stop({dead});
    cell.Form({1}, even(1));
    driver.BeginEpoch(cell.epoch());
  });
  ExpectSameBits(expected, got, "");
  EXPECT_EQ(cell.epoch(), 2u);
}

TEST(WorkerProcessTest, ABrokenStreamIsFollowedByANewRegistration) {
  RemoteCell cell("mixtral", 1, 1);
  TestDriver driver(cell.Target());
  cell.scheduler().SetOnResult([&](StepResult result) { driver.OnResult(std::move(result)); });
  const ModelInfo& model = driver.target().model;
  const ExpertPlacement placement =
      ExpertPlacement::Even(model.num_moe_layers, model.num_experts, 1);
  SamplingParams greedy;
  greedy.temperature = 0.0f;
  cell.Form({1}, placement);
  driver.BeginEpoch(cell.epoch());
  const std::vector<int32_t> tokens = driver.Generate({3, 1, 4}, greedy, 5).tokens;
  const v1::Register before = cell.registration(1);
  cell.scheduler().Break(cell.id(1));
  cell.Welcome(1);
  EXPECT_EQ(cell.registration(1).incarnation(), before.incarnation());
  EXPECT_NE(cell.registration(1).data_address(), before.data_address());
  cell.scheduler().Break(cell.id(0));
  cell.Welcome(0);
  cell.Form({1}, placement);
  driver.BeginEpoch(cell.epoch());
  EXPECT_EQ(driver.Generate({3, 1, 4}, greedy, 5).tokens, tokens);
  // Its experts were still there: what it did is one load and two times five steps of 3 + 4 rows.
  const uint64_t layers = static_cast<uint64_t>(model.num_moe_layers);
  const uint64_t copies = 2 * 7 * layers * static_cast<uint64_t>(model.top_k);
  const v1::Heartbeat heartbeat = cell.scheduler().ExpectHeartbeat(
      cell.id(1), [&](const v1::Heartbeat& h) { return h.rows() >= copies; });
  EXPECT_EQ(heartbeat.rows(), copies);
  const v1::MoeStats stats =
      cell.scheduler().Expect(cell.id(1), MessageCase::kMoeStats).moe_stats();
  EXPECT_EQ(static_cast<uint64_t>(stats.expert_copies_size()),
            layers * static_cast<uint64_t>(model.num_experts));
  EXPECT_GT(
      std::accumulate(stats.expert_copies().begin(), stats.expert_copies().end(), uint64_t{0}), 0u);
  ASSERT_GT(stats.counters_size(), 0);
  EXPECT_EQ(stats.counters(0).name(), "data_wait_seconds");
  EXPECT_LE(heartbeat.progress(), layers * static_cast<uint64_t>(model.num_experts) + 10 * layers);
}

TEST(WorkerProcessTest, OnlyTheNewestSchedulerIsFollowed) {
  FakeScheduler scheduler;
  scheduler.SetIncarnation(7);
  const std::unique_ptr<WorkerProcess> process = Start(Options(scheduler, {kExpert}));
  v1::Register registration;
  const uint64_t first = scheduler.NextWorker(&registration);
  scheduler.ExpectHeartbeat(first, [](const v1::Heartbeat&) { return true; });
  scheduler.SetIncarnation(6);
  scheduler.Break(first);
  const uint64_t second = scheduler.NextWorker(&registration);
  EXPECT_TRUE(scheduler.ExpectEnd(second));  // the worker hangs up
  scheduler.SetIncarnation(8);
  uint64_t newest = 0;
  do {  // it may have tried again before
    newest = scheduler.NextWorker(&registration);
  } while (newest != 0 && scheduler.Incarnation(newest) != 8);
  scheduler.ExpectHeartbeat(newest, [](const v1::Heartbeat&) { return true; });
}

TEST(WorkerProcessTest, BadOrdersAreAnsweredNotObeyed) {
  RemoteCell cell("qwen3_moe", 1, 1);
  FakeScheduler& scheduler = cell.scheduler();
  // An epoch that was never installed here, and a step of it.
  StepPlan step;
  step.header = {.epoch = 3, .step = 1, .participants = {0}};
  scheduler.SendStep(cell.id(1), step);
  scheduler.Abort(cell.id(1), 3);
  EXPECT_EQ(scheduler.Expect(cell.id(1), MessageCase::kQuiesced).quiesced().epoch(), 3u);
  // Experts that were not loaded; a placement of another model.
  const std::vector<FakeScheduler::Member> members = {
      {cell.id(0), cell.registration(0).data_address()},
      {cell.id(1), cell.registration(1).data_address()}};
  scheduler.Install(4, members, 1, ExpertPlacement::Even(2, 8, 1));
  EXPECT_THAT(scheduler.Expect(cell.id(1), MessageCase::kEpochFailed).epoch_failed().error(),
              HasSubstr("expert 0 of MoE layer 0 is not loaded"));
  scheduler.Install(5, members, 1, ExpertPlacement::Even(2, 9, 1));
  EXPECT_THAT(scheduler.Expect(cell.id(1), MessageCase::kEpochFailed).epoch_failed().error(),
              HasSubstr("18 host lists for 2 MoE layers of 8 experts"));
}

TEST(WorkerProcessTest, ARefusalEndsTheProcessWithTheReason) {
  FakeScheduler scheduler;
  scheduler.SetToken("right");
  WorkerProcessOptions options = Options(scheduler, {kExpert});
  options.control.token = "wrong";
  const std::optional<absl::Status> unknown = Start(options)->WaitFor(kLong);
  ASSERT_TRUE(unknown.has_value());
  EXPECT_THAT(std::string(unknown->message()), HasSubstr("the cluster token is wrong"));
  scheduler.SetRefusal("numerics cpu/avx2/1/float32, not cpu/portable/1/float32");
  options.control.token = "right";
  options.roles = {kAttention, kExpert};
  const std::optional<absl::Status> refused = Start(options)->WaitFor(kLong);
  ASSERT_TRUE(refused.has_value());
  EXPECT_THAT(std::string(refused->message()),
              testing::AllOf(HasSubstr(scheduler.address()), HasSubstr("not cpu/portable")));
}

TEST(WorkerProcessTest, DrainWaitsForTheGoodbye) {
  RemoteCell cell("qwen3_moe", 1, 1);
  FakeScheduler& scheduler = cell.scheduler();
  WorkerProcessOptions options = Options(scheduler, {kAttention, kExpert});
  const std::unique_ptr<WorkerProcess> both = Start(options);
  std::vector<uint64_t> ids;
  std::set<int> roles;
  for (int i = 0; i < 2; ++i) {
    v1::Register registration;
    ids.push_back(scheduler.NextWorker(&registration));
    roles.insert(registration.role());
    scheduler.ExpectHeartbeat(ids.back(), [](const v1::Heartbeat&) { return true; });
  }
  EXPECT_EQ(roles.size(), 2u);
  both->Drain();
  v1::SchedulerMessage goodbye;
  goodbye.mutable_goodbye();
  for (uint64_t id : ids) {
    scheduler.Expect(id, MessageCase::kDrain);
    EXPECT_FALSE(both->WaitFor(std::chrono::milliseconds(0)).has_value());
    scheduler.Send(id, goodbye);
  }
  const std::optional<absl::Status> end = both->WaitFor(kLong);
  ASSERT_TRUE(end.has_value());
  EXPECT_TRUE(end->ok()) << *end;
}

TEST(WorkerProcessTest, WithoutASchedulerItWaitsAndDrainsAtOnce) {
  WorkerProcessOptions options;
  {
    FakeScheduler gone;
    options = Options(gone, {kExpert});
  }
  const std::unique_ptr<WorkerProcess> process = Start(options);
  EXPECT_FALSE(process->WaitFor(std::chrono::milliseconds(0)).has_value());
  process->Drain();
  const std::optional<absl::Status> end = process->WaitFor(kLong);
  ASSERT_TRUE(end.has_value());
  EXPECT_TRUE(end->ok()) << *end;
}

TEST(WorkerProcessTest, TooLittleMemoryIsAnErrorWithTheSum) {
  FakeScheduler scheduler;
  WorkerProcessOptions options = Options(scheduler, {kExpert});
  options.expert_memory = 10;
  EXPECT_THAT(std::string(WorkerProcess::Create(options).status().message()),
              HasSubstr("--expert-memory 10 holds no expert"));
  options = Options(scheduler, {kAttention});
  options.kv_cache_memory = int64_t{1} << 50;
  EXPECT_THAT(std::string(WorkerProcess::Create(options).status().message()),
              HasSubstr("1125899906842624 bytes"));
}

}  // namespace
}  // namespace switchyard
