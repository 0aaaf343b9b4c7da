#include "scheduler/cell_costs.h"

#include <gtest/gtest.h>

#include "comm/plan_costs.h"

namespace switchyard {
namespace {

v1::PlanCosts Costs(int64_t token, int64_t read, int64_t move) {
  v1::PlanCosts costs;
  costs.set_token_ps(token);
  costs.set_expert_read_ps(read);
  costs.set_expert_move_ps(move);
  return costs;
}

TEST(CellCosts, MedianOfComputingAndReadingLargestOfMoving) {
  const v1::PlanCosts costs =
      CombineCosts({Costs(30, 100, 5000), Costs(10, 300, 9000), Costs(20, 200, 1000)});
  EXPECT_EQ(costs.token_ps(), 20);
  EXPECT_EQ(costs.expert_read_ps(), 200);
  EXPECT_EQ(costs.expert_move_ps(), 9000);
  // Of two the lower one.
  EXPECT_EQ(CombineCosts({Costs(30, 100, 1), Costs(10, 300, 2)}).token_ps(), 10);
}

TEST(CellCosts, OneWorkerThatKnowsNoCostOfMovingStopsMoves) {
  EXPECT_EQ(CombineCosts({Costs(10, 100, 5000), Costs(10, 100, 0)}).expert_move_ps(), 0);
  EXPECT_EQ(CombineCosts({}).expert_move_ps(), 0);
}

TEST(CellCosts, NothingLeavesTheRangeOfThePlanner) {
  const v1::PlanCosts costs = CombineCosts({Costs(INT64_MAX, INT64_MAX, INT64_MAX)});
  PlanCosts plan;
  plan.token_ps = costs.token_ps();
  plan.expert_read_ps = costs.expert_read_ps();
  plan.expert_move_ps = costs.expert_move_ps();
  EXPECT_TRUE(CheckPlanCosts(plan).ok());
  EXPECT_EQ(CombineCosts({Costs(-1, -1, -1)}).token_ps(), 0);
}

}  // namespace
}  // namespace switchyard
