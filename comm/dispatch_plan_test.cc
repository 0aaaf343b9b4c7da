#include "comm/dispatch_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <numeric>

#include "comm/test_problems.h"

namespace switchyard {
namespace {

struct Problem {
  int32_t num_sources;
  std::vector<int32_t> counts;
  ExpertPlacement placement;
};

Problem RandomProblem(std::mt19937& rng, int32_t max_sources, int32_t max_experts,
                      int32_t max_ranks) {
  const int32_t sources = 1 + Below(rng, max_sources);
  const int32_t experts = 1 + Below(rng, max_experts);
  return {sources, RandomCounts(rng, sources, experts),
          RandomPlacement(rng, 1, experts, 1 + Below(rng, max_ranks))};
}

// The rules that every plan keeps exactly.
void CheckInvariants(const Problem& problem, const DispatchPlan& plan) {
  const int32_t experts = problem.placement.num_experts();
  ASSERT_EQ(plan.num_sources, problem.num_sources);
  ASSERT_EQ(plan.num_experts, experts);
  ASSERT_EQ(plan.num_ranks, problem.placement.num_ranks());
  std::vector<int64_t> load(static_cast<size_t>(plan.num_ranks), 0);
  for (int32_t s = 0; s < problem.num_sources; ++s) {
    for (int32_t e = 0; e < experts; ++e) {
      const std::span<const int32_t> hosts = problem.placement.Hosts(0, e);
      int64_t copies = 0;
      int32_t previous = -1;
      for (const DispatchShare& share : plan.Of(s, e)) {
        ASSERT_GT(share.rank, previous) << "shares ascend by rank";
        ASSERT_GT(share.copies, 0);
        ASSERT_TRUE(std::ranges::binary_search(hosts, share.rank))
            << "rank " << share.rank << " hosts expert " << e;
        previous = share.rank;
        copies += share.copies;
        load[static_cast<size_t>(share.rank)] += share.copies;
      }
      ASSERT_EQ(copies, problem.counts[static_cast<size_t>(s * experts + e)])
          << "source " << s << " expert " << e;
    }
  }
  ASSERT_EQ(plan.max_rank_copies, *std::ranges::max_element(load));
  ASSERT_GE(plan.max_rank_copies, plan.lower_bound);
  const int64_t total = std::accumulate(load.begin(), load.end(), int64_t{0});
  ASSERT_GE(plan.lower_bound, (total + plan.num_ranks - 1) / plan.num_ranks);
}

// The smallest possible maximum: copies whose experts lie within a set of ranks are shared by that
// set, and over all sets this is exact (max-flow, min-cut).
int64_t Optimum(const Problem& problem) {
  const int32_t ranks = problem.placement.num_ranks();
  const int32_t experts = problem.placement.num_experts();
  int64_t best = 0;
  for (uint32_t set = 1; set < (1u << ranks); ++set) {
    int64_t load = 0;
    for (int32_t e = 0; e < experts; ++e) {
      const std::span<const int32_t> hosts = problem.placement.Hosts(0, e);
      if (!std::ranges::all_of(hosts, [&](int32_t r) { return (set >> r & 1) != 0; })) continue;
      for (int32_t s = 0; s < problem.num_sources; ++s)
        load += problem.counts[static_cast<size_t>(s * experts + e)];
    }
    const int64_t size = std::popcount(set);
    best = std::max(best, (load + size - 1) / size);
  }
  return best;
}

TEST(PlanDispatch, KeepsItsInvariantsOnRandomProblems) {
  std::mt19937 rng = SeededRng();
  for (int i = 0; i < 100000; ++i) {
    const Problem problem = RandomProblem(rng, 4, 24, 7);
    const DispatchPlan plan =
        PlanDispatch(problem.counts, problem.num_sources, problem.placement, 0);
    CheckInvariants(problem, plan);
    if (HasFatalFailure()) FAIL() << "problem " << i;
  }
  for (int i = 0; i < 200; ++i) {
    const Problem problem = RandomProblem(rng, 8, 400, 32);
    const DispatchPlan plan =
        PlanDispatch(problem.counts, problem.num_sources, problem.placement, 0);
    CheckInvariants(problem, plan);
    if (HasFatalFailure()) FAIL() << "large problem " << i;
  }
}

TEST(PlanDispatch, IsCloseToTheOptimumOnAverage) {
  std::mt19937 rng = SeededRng();
  double ratio = 0, bound_ratio = 0;
  int optimal = 0, num = 0;
  while (num < 20000) {
    const Problem problem = RandomProblem(rng, 3, 16, 6);
    const int64_t optimum = Optimum(problem);
    if (optimum == 0) continue;
    const DispatchPlan plan =
        PlanDispatch(problem.counts, problem.num_sources, problem.placement, 0);
    ASSERT_GE(plan.max_rank_copies, optimum);
    ASSERT_LE(plan.lower_bound, optimum);
    ratio += static_cast<double>(plan.max_rank_copies) / static_cast<double>(optimum);
    bound_ratio += static_cast<double>(plan.lower_bound) / static_cast<double>(optimum);
    optimal += plan.max_rank_copies == optimum ? 1 : 0;
    ++num;
  }
  std::cout << "mean max/optimum " << ratio / num << ", optimal in " << 100.0 * optimal / num
            << " %, mean lower bound/optimum " << bound_ratio / num << "\n";
  EXPECT_LT(ratio / num, 1.02);
  EXPECT_GT(bound_ratio / num, 0.95);
}

TEST(PlanDispatch, OneReplicaLeavesNoChoice) {
  const ExpertPlacement placement = ExpertPlacement::Even(1, 4, 2);
  const std::vector<int32_t> counts = {3, 0, 1, 2, 0, 0, 0, 5};
  const DispatchPlan plan = PlanDispatch(counts, 2, placement, 0);
  EXPECT_EQ(plan.max_rank_copies, 8);
  EXPECT_EQ(plan.lower_bound, 8);
  ASSERT_EQ(plan.Of(0, 0).size(), 1u);
  EXPECT_EQ(plan.Of(0, 0)[0], (DispatchShare{0, 3}));
  EXPECT_TRUE(plan.Of(0, 1).empty());
  EXPECT_EQ(plan.Of(1, 3)[0], (DispatchShare{1, 5}));
}

TEST(PlanDispatch, SplitsAHotExpertOverItsReplicas) {
  const auto placement = ExpertPlacement::Create(3, {{{0}, {0, 1, 2}}});
  ASSERT_TRUE(placement.ok());
  const DispatchPlan plan =
      PlanDispatch(std::vector<int32_t>{4, 3, 0, 5}, 2, *placement, 0);  // T = 12
  EXPECT_EQ(plan.lower_bound, 4);
  EXPECT_EQ(plan.max_rank_copies, 4);
  // Rank 0 is full; expert 1's eight copies go to ranks 1 and 2: source 0 gives 3 to rank 1, source
  // 1 the rest.
  EXPECT_EQ(plan.Of(0, 1)[0], (DispatchShare{1, 3}));
  ASSERT_EQ(plan.Of(1, 1).size(), 2u);
  EXPECT_EQ(plan.Of(1, 1)[0], (DispatchShare{1, 1}));
  EXPECT_EQ(plan.Of(1, 1)[1], (DispatchShare{2, 4}));
}

TEST(PlanDispatch, AnIdleExpertsHostsLowerNothing) {
  const ExpertPlacement placement = ExpertPlacement::Even(1, 5, 3);
  const DispatchPlan plan = PlanDispatch(std::vector<int32_t>(5, 0), 1, placement, 0);
  EXPECT_EQ(plan.max_rank_copies, 0);
  EXPECT_EQ(plan.lower_bound, 0);
  EXPECT_TRUE(plan.shares.empty());
}

// The hash and the shares are part of the protocol between ranks: a change of the planner must be
// seen here.
TEST(PlanDispatch, IsTheSameForTheSameInputAndItsHashFollowsThePlan) {
  std::mt19937 fixed(7);
  uint64_t all = 0;
  for (int i = 0; i < 1000; ++i) {
    const Problem problem = RandomProblem(fixed, 4, 24, 7);
    const DispatchPlan plan =
        PlanDispatch(problem.counts, problem.num_sources, problem.placement, 0);
    const DispatchPlan again =
        PlanDispatch(problem.counts, problem.num_sources, problem.placement, 0);
    ASSERT_EQ(plan.shares, again.shares);
    ASSERT_EQ(plan.hash, again.hash);
    all = all * 31 + plan.hash;

    std::vector<int32_t> other = problem.counts;
    ++other[static_cast<size_t>(Below(fixed, static_cast<int32_t>(other.size())))];
    ASSERT_NE(PlanDispatch(other, problem.num_sources, problem.placement, 0).hash, plan.hash);
  }
  EXPECT_EQ(all, 5298294986279876795u);
}

}  // namespace
}  // namespace switchyard
