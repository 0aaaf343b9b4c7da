// The matrix of shapes, transports, balance modes and random placements with replicas: every cell
// answers with the tokens and logprobs of one worker of each role, bit for bit. One cell of worker
// processes per shape, which goes from epoch to epoch.
#include <gtest/gtest.h>

#include <iostream>
#include <numeric>
#include <optional>
#include <ostream>

#include "kernels/test_seed.h"
#include "worker/remote_cell.h"

namespace switchyard {
namespace {

constexpr int32_t kForeignSlots = 2;
// At which moving an expert costs as much as computing two copies, so that weights do move.
constexpr int64_t kTokenNs = 1000;
constexpr int64_t kMoveNs = 2 * kTokenNs;

struct Shape {
  std::string fixture;
  int attention = 1;
  int experts = 1;
  std::string Name() const { return absl::StrCat(fixture, "_", attention, "x", experts); }
};
void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.Name(); }

std::vector<Shape> AllShapes() {
  std::vector<Shape> shapes;
  for (const char* fixture : {"qwen3_moe", "qwen2_moe"}) {  // the second has shared experts
    for (const auto& [attention, experts] : {std::pair{1, 1}, {1, 4}, {2, 3}, {3, 2}, {4, 1}})
      shapes.push_back({fixture, attention, experts});
  }
  return shapes;
}

class CellMatrixTest : public testing::TestWithParam<Shape> {
 protected:
  CellMatrixTest() { expected_ = Reference(GetParam().fixture, random_, &cases_); }
  void ExpectTheBits(TestDriver& driver, const std::string& what) {
    ExpectSameBits(expected_, RunMixed(driver, cases_, random_),
                   absl::StrCat(GetParam().Name(), " ", what));
  }

  std::mt19937 random_{TestSeed()};
  std::vector<Case> cases_;
  std::vector<TestOutput> expected_;
};

constexpr BalanceMode kModes[] = {BalanceMode::kNone, BalanceMode::kEplb, BalanceMode::kLlep,
                                  BalanceMode::kAuto};

TEST_P(CellMatrixTest, InOneProcess) {
  uint64_t moved = 0;
  for (BalanceMode mode : kModes) {
    CellOptions options;
    options.model_dir = remote::Fixture(GetParam().fixture);
    options.attention_workers = GetParam().attention;
    options.expert_workers = GetParam().experts;
    options.threads = 1;
    options.kv_cache_memory = GetParam().attention * (8 << 20);
    options.max_num_batched_tokens = 256;
    options.planner.mode = mode;
    options.planner.foreign_slots_per_rank = kForeignSlots;
    options.planner.costs = {.token_ps = kTokenNs * 1000,
                             .expert_read_ps = 0,
                             .expert_move_ps = kMoveNs * 1000,
                             .exact_plan_ps = 0};
    const absl::StatusOr<ModelFacts> facts = ReadModelFacts({.model_dir = options.model_dir});
    ASSERT_TRUE(facts.ok()) << facts.status();
    options.placement = RandomPlacement(facts->info, GetParam().experts, random_);
    const absl::StatusOr<std::unique_ptr<LocalCell>> cell = LocalCell::Create(options);
    ASSERT_TRUE(cell.ok()) << cell.status();
    TestDriver driver(cell->get());
    ExpectTheBits(driver, absl::StrCat("in-process ", BalanceModeName(mode)));
    for (int e = 0; e < GetParam().experts; ++e)
      moved += (*cell)->expert_counters(e).weights_received.load();
  }
  std::cout << moved << " experts moved\n";
  EXPECT_EQ(moved > 0, GetParam().experts > 1);
}

TEST_P(CellMatrixTest, OverTheNetwork) {
  RemoteCell cell(GetParam().fixture, GetParam().attention, GetParam().experts,
                  [](FakeScheduler* scheduler) {
                    v1::PlanCosts costs;
                    costs.set_token_ps(kTokenNs * 1000);
                    costs.set_expert_read_ps(1000);
                    costs.set_expert_move_ps(kMoveNs * 1000);
                    scheduler->SetForeignSlots(kForeignSlots);
                    scheduler->SetCosts(costs);
                  });
  std::vector<size_t> experts(static_cast<size_t>(GetParam().experts));
  std::iota(experts.begin(), experts.end(), static_cast<size_t>(GetParam().attention));
  for (BalanceMode mode : kModes) {
    std::shuffle(experts.begin(), experts.end(), random_);
    TestDriver driver(cell.Target());
    cell.scheduler().SetOnResult([&](StepResult result) { driver.OnResult(std::move(result)); });
    cell.Form(experts, *RandomPlacement(driver.target().model, GetParam().experts, random_),
              std::string(BalanceModeName(mode)));
    driver.BeginEpoch(cell.epoch());
    ExpectTheBits(driver, absl::StrCat("network ", BalanceModeName(mode)));
    cell.Stop();
    cell.scheduler().SetOnResult(nullptr);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CellMatrixTest, testing::ValuesIn(AllShapes()),
                         [](const auto& info) { return info.param.Name(); });

}  // namespace
}  // namespace switchyard
