#include "scheduler/batch_policy.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

namespace switchyard {
namespace {

RowCandidate Decode(SequenceId id, uint64_t last_step = 0) {
  return {.sequence = id, .pending = 1, .decoding = true, .alone = false, .last_step = last_step};
}
RowCandidate Prefill(SequenceId id, int32_t pending) {
  return {.sequence = id, .pending = pending, .decoding = false, .alone = false, .last_step = 0};
}

std::map<SequenceId, int32_t> Pick(const std::vector<RowCandidate>& candidates, int32_t budget) {
  std::map<SequenceId, int32_t> rows;
  for (const RowPick& pick : PickRows(candidates, budget)) rows[pick.sequence] = pick.count;
  return rows;
}
using Rows = std::map<SequenceId, int32_t>;

TEST(BatchPolicyTest, DecodesFirstThenPrefillsInOrder) {
  EXPECT_EQ(Pick({Prefill(1, 6), Decode(2), Prefill(3, 9), Decode(4), Prefill(5, 1)}, 10),
            (Rows{{1, 6}, {2, 1}, {3, 2}, {4, 1}}));
}

TEST(BatchPolicyTest, PrefillHasAShareWhenDecodesFillTheBudget) {
  std::vector<RowCandidate> candidates;
  for (SequenceId id = 1; id <= 40; ++id) candidates.push_back(Decode(id));
  candidates.push_back(Prefill(41, 100));
  EXPECT_EQ(Pick(candidates, 32).at(41), 4);
  candidates.back().pending = 2;  // the rest goes to decodes
  EXPECT_EQ(Pick(candidates, 32).size(), 31u);
}

TEST(BatchPolicyTest, DecodesThatDoNotFitTakeTurns) {
  EXPECT_EQ(Pick({Decode(1, 7), Decode(2, 6), Decode(3, 7), Decode(4, 6)}, 3),
            (Rows{{1, 1}, {2, 1}, {4, 1}}));
}

TEST(BatchPolicyTest, OneThatMustRunAloneDoes) {
  RowCandidate struck = Prefill(2, 50);
  struck.alone = true;
  EXPECT_EQ(Pick({Decode(1), struck, Prefill(3, 4)}, 16), (Rows{{2, 16}}));
}

TEST(BatchPolicyTest, RandomCandidatesKeepTheRules) {
  const uint64_t seed = 7;
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (int32_t trial = 0; trial < 20000; ++trial) {
    std::vector<RowCandidate> candidates;
    int64_t wanted = 0;
    for (SequenceId id = random() % 5; candidates.size() < 1 + random() % 12;
         id += 1 + random() % 3) {
      candidates.push_back(random() % 2 ? Decode(id, random() % 5)
                                        : Prefill(id, 1 + static_cast<int32_t>(random() % 30)));
      wanted += candidates.back().pending;
    }
    const int32_t budget = 1 + static_cast<int32_t>(random() % 40);
    const std::vector<RowPick> picks = PickRows(candidates, budget);
    int64_t given = 0;
    for (size_t i = 0; i < picks.size(); ++i) {
      if (i > 0) {
        ASSERT_LT(picks[i - 1].sequence, picks[i].sequence);
      }
      ASSERT_GE(picks[i].count, 1);
      given += picks[i].count;
    }
    ASSERT_EQ(given, std::min<int64_t>(wanted, budget));  // no row is wasted, none too many
  }
}

}  // namespace
}  // namespace switchyard
