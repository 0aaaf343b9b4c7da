#include "comm/expert_placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "comm/test_problems.h"

namespace switchyard {
namespace {

using ::testing::HasSubstr;

TEST(ExpertPlacement, EvenSplitsContiguouslyWithSizesThatDifferByAtMostOne) {
  for (int32_t experts = 1; experts <= 40; ++experts) {
    for (int32_t ranks = 1; ranks <= 9; ++ranks) {
      const ExpertPlacement placement = ExpertPlacement::Even(2, experts, ranks);
      ASSERT_TRUE(placement.Validate().ok());
      size_t least = SIZE_MAX, most = 0;
      int32_t next = 0;
      for (int32_t rank = 0; rank < ranks; ++rank) {
        const std::vector<int32_t> held = placement.ExpertsOf(1, rank);
        for (int32_t e : held) EXPECT_EQ(e, next++);
        least = std::min(least, held.size());
        most = std::max(most, held.size());
      }
      EXPECT_EQ(next, experts);
      EXPECT_LE(most - least, 1u);
    }
  }
}

TEST(ExpertPlacement, RefusesWhatIsNoPlacement) {
  const auto error = [](int32_t ranks, std::vector<std::vector<std::vector<int32_t>>> hosts) {
    return std::string(ExpertPlacement::Create(ranks, std::move(hosts)).status().message());
  };
  EXPECT_THAT(error(0, {}), HasSubstr("0 expert ranks"));
  EXPECT_THAT(error(2, {{{0}, {}}}), HasSubstr("expert 1 of layer 0 has no host"));
  EXPECT_THAT(error(2, {{{0}, {2}}}), HasSubstr("on rank 2 of 2"));
  EXPECT_THAT(error(2, {{{-1}}}), HasSubstr("on rank -1 of 2"));
  EXPECT_THAT(error(2, {{{0}}, {{0}, {1}}}), HasSubstr("layer 1 has 2 experts, layer 0 has 1"));
  EXPECT_THAT(error(2, {{{1, 1}}}), HasSubstr("not ascending"));  // two replicas on one rank
  EXPECT_THAT(error(3, {{{2, 0}}}), HasSubstr("not ascending"));
}

TEST(ExpertPlacement, RandomPlacementsAgreeInBothDirections) {
  std::mt19937 rng = SeededRng();
  for (int i = 0; i < 2000; ++i) {
    const ExpertPlacement placement = RandomPlacement(rng, 1 + i % 3, 1 + i % 33, 1 + i % 7);
    ASSERT_TRUE(placement.Validate().ok());
    for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
      std::vector<std::vector<int32_t>> hosts(static_cast<size_t>(placement.num_experts()));
      for (int32_t rank = 0; rank < placement.num_ranks(); ++rank) {
        const std::vector<int32_t> held = placement.ExpertsOf(layer, rank);
        EXPECT_TRUE(std::ranges::is_sorted(held));
        for (int32_t e : held) hosts[static_cast<size_t>(e)].push_back(rank);
      }
      for (int32_t e = 0; e < placement.num_experts(); ++e) {
        EXPECT_THAT(placement.Hosts(layer, e),
                    testing::ElementsAreArray(hosts[static_cast<size_t>(e)]));
      }
    }
  }
}

}  // namespace
}  // namespace switchyard
