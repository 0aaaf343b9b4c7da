#include "comm/placement_planner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "comm/test_problems.h"

namespace switchyard {
namespace {

std::vector<int64_t> ZipfLoads(std::mt19937& rng, int32_t layers, int32_t experts) {
  std::vector<int64_t> loads;
  for (int32_t layer = 0; layer < layers; ++layer) {
    std::vector<int64_t> one;
    for (int32_t e = 0; e < experts; ++e) one.push_back(100000 / (e + 1));
    std::ranges::shuffle(one, rng);
    loads.insert(loads.end(), one.begin(), one.end());
  }
  return loads;
}

void CheckValid(const PlacementRequest& request, const ExpertPlacement& placement) {
  ASSERT_TRUE(placement.Validate().ok()) << placement.Validate();
  ASSERT_EQ(placement.num_ranks(), request.num_ranks);
  for (int32_t layer = 0; layer < request.num_layers; ++layer) {
    for (int32_t r = 0; r < request.num_ranks; ++r) {
      ASSERT_LE(placement.ExpertsOf(layer, r).size(),
                static_cast<size_t>(request.home_slots_per_rank));
    }
  }
}

TEST(PlacementPlanner, RandomRequestsKeepTheRulesAlsoWhenRanksComeAndGo) {
  std::mt19937 rng = SeededRng();
  for (int i = 0; i < 3000; ++i) {
    PlacementRequest request{.num_layers = 1 + Below(rng, 2),
                             .num_experts = 1 + Below(rng, 30),
                             .num_ranks = 1 + Below(rng, 8)};
    const auto choose_slots = [&] {
      request.home_slots_per_rank =
          (request.num_experts + request.num_ranks - 1) / request.num_ranks + Below(rng, 4);
    };
    choose_slots();
    std::vector<int64_t> loads = ZipfLoads(rng, request.num_layers, request.num_experts);
    if (Below(rng, 5) == 0) std::ranges::fill(loads, 0);
    request.loads = loads;
    auto placement = PlanPlacement(request);
    ASSERT_TRUE(placement.ok()) << placement.status();
    CheckValid(request, *placement);
    if (HasFatalFailure()) FAIL() << i;

    // The same again: nothing moves. Then some ranks go, others come.
    request.current = &*placement;
    const auto again = PlanPlacement(request);
    ASSERT_TRUE(again.ok());
    EXPECT_TRUE(ExpertLoads(&*placement, {}, *again).empty());
    std::vector<int32_t> new_rank_of;
    int32_t next = Below(rng, 2);
    for (int32_t r = 0; r < request.num_ranks; ++r) {
      new_rank_of.push_back(Below(rng, 4) == 0 ? -1 : next++);
    }
    request.num_ranks = std::max(1, next + Below(rng, 2));
    request.new_rank_of = new_rank_of;
    choose_slots();
    std::ranges::shuffle(loads, rng);
    const auto after = PlanPlacement(request);
    ASSERT_TRUE(after.ok()) << after.status();
    CheckValid(request, *after);
    if (HasFatalFailure()) FAIL() << i;
  }
}

TEST(PlacementPlanner, TheHottestGetTwoReplicasBeforeAnyGetsThree) {
  std::mt19937 rng = SeededRng();
  for (int i = 0; i < 500; ++i) {
    const int32_t experts = 2 + Below(rng, 40), ranks = 2 + Below(rng, 7);
    PlacementRequest request{.num_layers = 1, .num_experts = experts, .num_ranks = ranks};
    request.home_slots_per_rank = (experts + ranks - 1) / ranks + Below(rng, 3);
    const std::vector<int64_t> loads = ZipfLoads(rng, 1, experts);
    request.loads = loads;
    const auto placement = PlanPlacement(request);
    ASSERT_TRUE(placement.ok());
    size_t total = 0, most = 0, fewest = SIZE_MAX;
    for (int32_t e = 0; e < experts; ++e) {
      const size_t n = placement->Hosts(0, e).size();
      total += n;
      most = std::max(most, n);
      fewest = std::min(fewest, n);
      for (int32_t f = 0; f < experts; ++f) {
        if (loads[static_cast<size_t>(e)] > loads[static_cast<size_t>(f)]) {
          EXPECT_GE(n, placement->Hosts(0, f).size());
        }
      }
    }
    EXPECT_EQ(total, std::min<size_t>(static_cast<size_t>(ranks * request.home_slots_per_rank),
                                      static_cast<size_t>(ranks * experts)));
    if (most > 2) {
      EXPECT_GE(fewest, 2u);
    }
  }
}

TEST(PlacementPlanner, BalancesSkewedLoadsWithFewMoves) {
  // One draw: what is reached differs by 0.01 between draws, and the bound is for this one.
  std::mt19937 rng(2);
  constexpr int32_t kLayers = 8, kExperts = 128, kRanks = 8;
  PlacementRequest request{.num_layers = kLayers,
                           .num_experts = kExperts,
                           .num_ranks = kRanks,
                           .home_slots_per_rank = kExperts / kRanks + 2};
  const std::vector<int64_t> unknown(kLayers * kExperts, 0);
  request.loads = unknown;
  const auto start = PlanPlacement(request);
  ASSERT_TRUE(start.ok());
  const std::vector<int64_t> loads = ZipfLoads(rng, kLayers, kExperts);
  request.loads = loads;
  request.current = &*start;
  const auto placement = PlanPlacement(request);
  ASSERT_TRUE(placement.ok());
  double before = 0, after = 0;
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    const auto of = std::span(loads).subspan(static_cast<size_t>(layer * kExperts), kExperts);
    before += PlacementImbalance(*start, layer, of) / kLayers;
    after += PlacementImbalance(*placement, layer, of) / kLayers;
  }
  const size_t moved = ExpertLoads(&*start, {}, *placement).size();
  std::cout << "max/mean " << before << " -> " << after << " with " << moved << " of "
            << kLayers * kExperts << " experts loaded anew\n";
  EXPECT_LT(after, 1.05);
  EXPECT_LT(moved, static_cast<size_t>(kLayers * kExperts * 2 / 5));

  // A little noise is no reason to move.
  std::vector<int64_t> noisy = loads;
  for (int64_t& load : noisy) load += load * (Below(rng, 7) - 3) / 100;
  request.loads = noisy;
  request.current = &*placement;
  const auto calm = PlanPlacement(request);
  ASSERT_TRUE(calm.ok());
  EXPECT_TRUE(ExpertLoads(&*placement, {}, *calm).empty());
}

TEST(PlacementPlanner, ANewRankIsUsedAndALostOneReplaced) {
  const std::vector<int64_t> loads(12, 100);
  PlacementRequest request{
      .num_layers = 1, .num_experts = 12, .num_ranks = 2, .home_slots_per_rank = 6};
  request.loads = loads;
  const auto two = PlanPlacement(request);
  ASSERT_TRUE(two.ok());
  request.num_ranks = 3;
  request.home_slots_per_rank = 4;
  request.current = &*two;
  const auto three = PlanPlacement(request);
  ASSERT_TRUE(three.ok());
  EXPECT_EQ(ExpertLoads(&*two, {}, *three).size(), 4u);  // only what the new rank holds
  request.num_ranks = 2;
  request.home_slots_per_rank = 6;
  request.current = &*three;
  const std::vector<int32_t> first_lost = {-1, 0, 1};
  request.new_rank_of = first_lost;
  const auto survivors = PlanPlacement(request);
  ASSERT_TRUE(survivors.ok());
  EXPECT_EQ(ExpertLoads(&*three, first_lost, *survivors).size(), 4u);
}

TEST(PlacementPlanner, ImpossibleRequestsAreRefused) {
  const std::vector<int64_t> loads(8, 1);
  PlacementRequest request{
      .num_layers = 1, .num_experts = 8, .num_ranks = 2, .home_slots_per_rank = 3};
  request.loads = loads;
  EXPECT_EQ(PlanPlacement(request).status().message(),
            "placement: 8 experts per layer do not fit into 3 home slots on each of 2 ranks");
  request.home_slots_per_rank = 4;
  request.loads = std::span(loads).first(7);
  EXPECT_FALSE(PlanPlacement(request).ok());
  const ExpertPlacement other = ExpertPlacement::Even(1, 9, 2);
  request.loads = loads;
  request.current = &other;
  EXPECT_FALSE(PlanPlacement(request).ok());
}

}  // namespace
}  // namespace switchyard
