#include "worker/sequence_table.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace switchyard {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr SequenceLimits kLimits = {
    .vocab_size = 100, .max_model_len = 64, .block_size = 16, .num_blocks = 8};

SequenceWork FirstWork(SequenceId id, std::vector<int32_t> tokens, int32_t count) {
  SequenceStart start;
  start.prompt_length = static_cast<int32_t>(tokens.size());
  start.tokens = std::move(tokens);
  start.sampling = std::make_shared<SamplingParams>();
  SequenceWork work;
  work.sequence = id;
  work.begin = std::make_shared<SequenceStart>(std::move(start));
  work.count = count;
  work.new_blocks = {3};
  return work;
}

absl::Status ApplyOne(SequenceTable& table, const SequenceWork& work) {
  StepPlan plan;
  plan.work = {work};
  return table.Apply(plan);
}

std::string ErrorOf(SequenceTable& table, const SequenceWork& work) {
  return std::string(ApplyOne(table, work).message());
}

TEST(SequenceTableTest, TokensAndBlocksAreOverwrittenByPosition) {
  SequenceTable table(kLimits);
  ASSERT_TRUE(ApplyOne(table, FirstWork(1, {5, 6, 7}, 3)).ok());
  SequenceWork next;
  next.sequence = 1;
  next.start = 3;
  next.count = 1;
  next.token_start = 3;
  next.tokens = {8};
  ASSERT_TRUE(ApplyOne(table, next).ok());
  next.tokens = {9};  // the same position again, with another token and another block
  next.block_table_start = 0;
  next.new_blocks = {4};
  ASSERT_TRUE(ApplyOne(table, next).ok());
  EXPECT_THAT(table.Get(1).tokens, ElementsAre(5, 6, 7, 9));
  EXPECT_THAT(table.Get(1).block_table, ElementsAre(4));
}

TEST(SequenceTableTest, TheFirstUnscoredTokenLiesInThePrompt) {
  SequenceTable table(kLimits);
  for (int32_t first : {0, 4}) {
    SequenceWork work = FirstWork(1, {5, 6, 7}, 3);
    SequenceStart start = *work.begin;
    start.first_unscored = first;
    work.begin = std::make_shared<SequenceStart>(start);
    EXPECT_THAT(ErrorOf(table, work), HasSubstr("of a prompt of 3"));
  }
}

TEST(SequenceTableTest, EndsComeBeforeWorkAndForget) {
  SequenceTable table(kLimits);
  ASSERT_TRUE(ApplyOne(table, FirstWork(1, {5}, 1)).ok());
  StepPlan plan;
  plan.ended = {{1}, {77}};
  plan.work = {FirstWork(2, {6}, 1)};
  ASSERT_TRUE(table.Apply(plan).ok());
  EXPECT_EQ(table.size(), 1u);
  SequenceWork again;
  again.sequence = 1;
  again.count = 1;
  EXPECT_THAT(ErrorOf(table, again), HasSubstr("sequence 1 run 0: unknown"));
}

TEST(SequenceTableTest, ANewRunReplacesTheOldOne) {
  SequenceTable table(kLimits);
  ASSERT_TRUE(ApplyOne(table, FirstWork(1, {5, 6, 7}, 3)).ok());
  SequenceWork second = FirstWork(1, {5, 6, 7, 20}, 2);
  second.run = 1;
  ASSERT_TRUE(ApplyOne(table, second).ok());
  EXPECT_EQ(table.Get(1).run, 1u);
  SequenceWork stale;
  stale.sequence = 1;
  stale.run = 0;
  stale.count = 1;
  EXPECT_THAT(ErrorOf(table, stale), HasSubstr("knows run 1"));
}

TEST(SequenceTableTest, WhatDoesNotFitIsNamed) {
  SequenceTable table(kLimits);
  SequenceWork work = FirstWork(1, {5, 100}, 2);
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("token 100 of a vocabulary of 100"));
  work = FirstWork(1, {5, 6}, 3);
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("token at position 2 is not known"));
  work = FirstWork(1, {5, 6}, 65);
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("[0, 65) are not within [0, 64)"));
  work = FirstWork(1, {5, 6}, 2);
  work.start = INT32_MAX;
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("not within"));
  work = FirstWork(1, {5, 6}, 2);
  work.new_blocks = {8};
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("block 8 of 8"));
  work.new_blocks = {0, 1, 2, 3, 4};
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("5 blocks from index 0"));
  work.new_blocks = {};
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("blocks cover 0 of 2"));
  work = FirstWork(1, {5, 6}, 2);
  work.block_table_start = 1;
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("from index 1 of a table of 0"));
  work = FirstWork(1, std::vector<int32_t>(65, 1), 1);
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("65 tokens exceed max_model_len 64"));
  work = FirstWork(1, {5}, 1);
  work.token_start = 64;
  work.tokens = {1};
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("1 tokens from position 64"));
  work = FirstWork(1, {5}, 1);
  auto start = std::make_shared<SequenceStart>(*work.begin);
  start->sampling = nullptr;
  work.begin = start;
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("without sampling"));
  start = std::make_shared<SequenceStart>(*FirstWork(1, {5}, 1).begin);
  start->prompt_length = 2;
  work.begin = start;
  EXPECT_THAT(ErrorOf(table, work), HasSubstr("prompt_length 2 of 1"));
}

}  // namespace
}  // namespace switchyard
