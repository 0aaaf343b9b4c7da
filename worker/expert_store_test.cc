// The loader of an expert worker: what its budget holds back beside steps, and what it never does.
#include "worker/expert_store.h"

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/mutex.h"
#include "kernels/thread_pool.h"
#include "worker/load_budget.h"

namespace switchyard {
namespace {

using std::chrono::milliseconds;
constexpr std::chrono::seconds kLong{60};

// Steps until `parts` are loaded, each step of 10 ms of virtual time and never idle.
int StepsFor(LoadBudget* budget, int parts) {
  LoadBudget::TimePoint now{};
  now += std::chrono::hours(1);
  int steps = 0;
  while (parts > 0) {
    budget->CountStep(now);
    ++steps;
    while (parts > 0 && budget->Take(/*step_under_way=*/true, now)) --parts;
    now += milliseconds(10);
  }
  return steps;
}

TEST(LoadBudget, APartTakesItsShareOfSteps) {
  for (const auto& [part, per_step] :
       {std::pair{100, 10}, {100, 100}, {100, 30}, {100, 250}, {7, 3}, {1, 1000}}) {
    LoadBudget budget(part);
    budget.Begin(per_step);
    const int parts = 50;
    EXPECT_EQ(StepsFor(&budget, parts), (parts * part + per_step - 1) / per_step)
        << part << " bytes, " << per_step << " per step";
  }
}

TEST(LoadBudget, StepsWithoutALoadAreNotSavedUp) {
  LoadBudget budget(100);
  budget.Begin(100);
  LoadBudget::TimePoint now{};
  now += std::chrono::hours(1);
  for (int i = 0; i < 1000; ++i) budget.CountStep(now);
  int taken = 0;
  while (budget.Take(true, now)) ++taken;
  EXPECT_EQ(taken, 2);  // a part that was left, and this step's
}

TEST(LoadBudget, WithoutALimitOrStepsNothingIsHeldBack) {
  LoadBudget budget(100);
  LoadBudget::TimePoint now{};
  now += std::chrono::hours(1);
  budget.Begin(1);
  EXPECT_TRUE(budget.Take(/*step_under_way=*/false, now)) << "no step was ever run";
  EXPECT_FALSE(budget.Take(/*step_under_way=*/true, now));
  budget.CountStep(now);
  EXPECT_FALSE(budget.Take(false, now + LoadBudget::kIdle - milliseconds(1)));
  EXPECT_EQ(budget.idle_at(), now + LoadBudget::kIdle);
  EXPECT_TRUE(budget.Take(false, now + LoadBudget::kIdle));
  EXPECT_FALSE(budget.Take(true, now + 10 * LoadBudget::kIdle)) << "one long step";
  budget.Begin(0);
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(budget.Take(true, now));
}

class ExpertStoreTest : public testing::Test {
 protected:
  ExpertStoreTest() {
    absl::StatusOr<OpenedModel> model =
        OpenModel({.model_dir = absl::StrCat(SWITCHYARD_SOURCE_DIR, "/tests/fixtures/qwen3_moe")});
    EXPECT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    experts_.resize(static_cast<size_t>(model_.info.num_moe_layers));
    for (auto& layer : experts_) {
      for (int32_t e = 0; e < model_.info.num_experts; ++e) layer.push_back(e);
    }
    total_ = static_cast<uint64_t>(model_.info.num_moe_layers * model_.info.num_experts);
    store_ = MakeStore();
  }
  std::unique_ptr<ExpertStore> MakeStore() {
    std::string error;
    return std::make_unique<ExpertStore>(&model_, MakeCpuBackend(&pool_, "auto", &error),
                                         counters_);
  }
  // Assigns everything; `done` counts.
  void Assign(int64_t bytes_per_step) {
    store_->Assign(experts_, bytes_per_step, [this](const std::vector<ExpertStore::Sum>& sums) {
      MutexLock lock(mu_);
      sums_ = sums;
      ++done_;
      changed_.NotifyAll();
    });
  }
  bool AwaitDone(int count) {
    const auto deadline = std::chrono::steady_clock::now() + kLong;
    MutexLock lock(mu_);
    while (done_ < count) {
      if (!changed_.WaitUntil(mu_, deadline)) break;
    }
    return done_ == count;
  }
  bool AwaitHeldBack() {
    const auto deadline = std::chrono::steady_clock::now() + kLong;
    while (store_->loading()) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }

  OpenedModel model_;
  ExpertStore::ExpertLists experts_;  // all
  uint64_t total_ = 0;
  ThreadPool pool_{1};
  const std::shared_ptr<WorkerCounters> counters_ = std::make_shared<WorkerCounters>();
  std::unique_ptr<ExpertStore> store_;

  Mutex mu_;
  CondVar changed_;
  int done_ SY_GUARDED_BY(mu_) = 0;
  std::vector<ExpertStore::Sum> sums_ SY_GUARDED_BY(mu_);
};

TEST_F(ExpertStoreTest, BesideStepsItLoadsWhatTheBudgetAllows) {
  counters_->steps.store(1);  // one is always under way
  Assign(model_.expert_bytes / 2);
  for (uint64_t step = 1; step < 2 * total_; ++step) {
    const uint64_t before = store_->progress();
    store_->CountStep();
    // Every second step pays for an expert.
    const auto deadline = std::chrono::steady_clock::now() + kLong;
    while (store_->progress() < step / 2 && std::chrono::steady_clock::now() < deadline)
      std::this_thread::yield();
    ASSERT_TRUE(AwaitHeldBack());
    ASSERT_EQ(store_->progress(), step / 2) << "at step " << step << ", before: " << before;
  }
  EXPECT_FALSE(store_->loading()) << "held back is not busy";
  store_->CountStep();
  ASSERT_TRUE(AwaitDone(1));
  EXPECT_EQ(store_->progress(), total_);
}

TEST_F(ExpertStoreTest, AnUrgentLoadWaitsForNoStep) {
  counters_->steps.store(1);
  Assign(1);
  ASSERT_TRUE(AwaitHeldBack());
  Assign(0);  // now somebody waits
  EXPECT_TRUE(AwaitDone(1));
  EXPECT_EQ(store_->progress(), total_);
}

TEST_F(ExpertStoreTest, AnIdleWorkerLoadsAtOnce) {
  Assign(1);
  ASSERT_TRUE(AwaitDone(1));
  EXPECT_EQ(store_->progress(), total_);
  // And when the steps end while it is held back.
  store_ = MakeStore();
  counters_->steps.store(1);
  Assign(1);
  ASSERT_TRUE(AwaitHeldBack());
  counters_->steps.store(0);
  ASSERT_TRUE(AwaitDone(2));
}

TEST_F(ExpertStoreTest, EveryExpertHasASumOfItsOwnThatAllStoresAgreeOn) {
  std::map<std::pair<int32_t, int32_t>, uint64_t> first;
  std::set<uint64_t> different;
  for (int round = 1; round <= 3; ++round) {
    if (round > 1) store_ = MakeStore();  // on memory that others have used
    Assign(0);
    ASSERT_TRUE(AwaitDone(round));
    MutexLock lock(mu_);
    ASSERT_EQ(sums_.size(), total_);
    for (const ExpertStore::Sum& sum : sums_) {
      const auto [known, is_new] = first.insert({{sum.layer, sum.expert}, sum.checksum});
      EXPECT_EQ(is_new, round == 1);
      EXPECT_EQ(known->second, sum.checksum) << "layer " << sum.layer << ", expert " << sum.expert;
      different.insert(sum.checksum);
    }
  }
  EXPECT_EQ(different.size(), total_);
}

}  // namespace
}  // namespace switchyard
