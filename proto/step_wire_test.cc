// A plan and a result with every field set survive the wire, through the serialized bytes.
#include "proto/step_wire.h"

#include <gtest/gtest.h>

namespace switchyard {
namespace {

TEST(StepWire, PlanKeepsEveryField) {
  auto sampling =
      std::make_shared<SamplingParams>(SamplingParams{.temperature = 0.7f,
                                                      .top_p = 0.9f,
                                                      .min_p = 0.05f,
                                                      .top_k = 40,
                                                      .presence_penalty = 0.1f,
                                                      .frequency_penalty = 0.2f,
                                                      .repetition_penalty = 1.3f,
                                                      .seed = 0xfedcba9876543210,
                                                      .choice = 3,
                                                      .min_tokens = 5,
                                                      .banned_before_min = {1, 2},
                                                      .logit_bias = {{7, -1.5f}, {9, 100.0f}},
                                                      .num_logprobs = 20,
                                                      .num_prompt_logprobs = 0,
                                                      .routing_profile = 4});
  StepPlan plan;
  plan.header.epoch = 3;
  plan.header.step = 1ull << 40;
  plan.header.participants = {0, 2};
  plan.header.micro_batches = 2;
  plan.header.slots_generation = 9;
  plan.ended = {{11}, {12}};
  plan.work.push_back(
      {.sequence = 5,
       .run = 2,
       .begin = std::make_shared<SequenceStart>(SequenceStart{
           .tokens = {4, 5, 6}, .prompt_length = 2, .first_unscored = 2, .sampling = sampling}),
       .start = 1,
       .count = 2,
       .block_table_start = 1,
       .new_blocks = {8, 9},
       .token_start = 1,
       .tokens = {5, 6},
       .sample = true});
  plan.work.emplace_back().sequence = 6;
  v1::StepPlan wire;
  ToWire(plan, &wire);
  v1::StepPlan parsed;
  ASSERT_TRUE(parsed.ParseFromString(wire.SerializeAsString()));
  const StepPlan back = FromWire(parsed);

  EXPECT_EQ(back.header.epoch, plan.header.epoch);
  EXPECT_EQ(back.header.step, plan.header.step);
  EXPECT_EQ(back.header.participants, plan.header.participants);
  EXPECT_EQ(back.header.micro_batches, plan.header.micro_batches);
  EXPECT_EQ(back.header.slots_generation, plan.header.slots_generation);
  ASSERT_EQ(back.ended.size(), 2u);
  EXPECT_EQ(back.ended[1].sequence, 12u);
  ASSERT_EQ(back.work.size(), 2u);
  const SequenceWork& work = back.work[0];
  EXPECT_EQ(work.sequence, 5u);
  EXPECT_EQ(work.run, 2u);
  EXPECT_EQ(work.start, 1);
  EXPECT_EQ(work.count, 2);
  EXPECT_EQ(work.block_table_start, 1);
  EXPECT_EQ(work.new_blocks, plan.work[0].new_blocks);
  EXPECT_EQ(work.token_start, 1);
  EXPECT_EQ(work.tokens, plan.work[0].tokens);
  EXPECT_TRUE(work.sample);
  ASSERT_NE(work.begin, nullptr);
  EXPECT_EQ(work.begin->tokens, plan.work[0].begin->tokens);
  EXPECT_EQ(work.begin->prompt_length, 2);
  EXPECT_EQ(work.begin->first_unscored, 2);
  const SamplingParams& params = *work.begin->sampling;
  EXPECT_EQ(params.temperature, sampling->temperature);
  EXPECT_EQ(params.top_p, sampling->top_p);
  EXPECT_EQ(params.min_p, sampling->min_p);
  EXPECT_EQ(params.top_k, sampling->top_k);
  EXPECT_EQ(params.presence_penalty, sampling->presence_penalty);
  EXPECT_EQ(params.frequency_penalty, sampling->frequency_penalty);
  EXPECT_EQ(params.repetition_penalty, sampling->repetition_penalty);
  EXPECT_EQ(params.seed, sampling->seed);
  EXPECT_EQ(params.choice, sampling->choice);
  EXPECT_EQ(params.min_tokens, sampling->min_tokens);
  EXPECT_EQ(params.banned_before_min, sampling->banned_before_min);
  EXPECT_EQ(params.logit_bias, sampling->logit_bias);
  EXPECT_EQ(params.num_logprobs, sampling->num_logprobs);
  EXPECT_EQ(params.num_prompt_logprobs, sampling->num_prompt_logprobs);
  EXPECT_EQ(params.routing_profile, sampling->routing_profile);
  EXPECT_EQ(back.work[1].begin, nullptr);
}

TEST(StepWire, ResultKeepsEveryField) {
  const TokenLogprob logprob{.token = 4, .logprob = -0.25f, .top = {{4, -0.25f}, {1, -2.0f}}};
  StepResult result{.epoch = 2,
                    .step = 7,
                    .worker = 1,
                    .error = "no",
                    .fatal = true,
                    .results = {},
                    .step_ns = 1ll << 40,
                    .wait_ns = 5};
  result.results.push_back({.sequence = 9,
                            .run = 3,
                            .computed = 12,
                            .token = 4,
                            .finite = false,
                            .logprob = logprob,
                            .prompt_logprobs_start = 1,
                            .prompt_logprobs = {logprob, logprob}});
  v1::StepResult wire;
  ToWire(result, &wire);
  v1::StepResult parsed;
  ASSERT_TRUE(parsed.ParseFromString(wire.SerializeAsString()));
  const StepResult back = FromWire(parsed);
  EXPECT_EQ(back.epoch, 2u);
  EXPECT_EQ(back.step, 7u);
  EXPECT_EQ(back.worker, 1);
  EXPECT_EQ(back.error, "no");
  EXPECT_TRUE(back.fatal);
  EXPECT_EQ(back.step_ns, 1ll << 40);
  EXPECT_EQ(back.wait_ns, 5);
  ASSERT_EQ(back.results.size(), 1u);
  const SequenceResult& out = back.results[0];
  EXPECT_EQ(out.sequence, 9u);
  EXPECT_EQ(out.run, 3u);
  EXPECT_EQ(out.computed, 12);
  EXPECT_EQ(out.token, 4);
  EXPECT_FALSE(out.finite);
  EXPECT_EQ(out.logprob.token, 4);
  EXPECT_EQ(out.logprob.logprob, logprob.logprob);
  EXPECT_EQ(out.logprob.top, logprob.top);
  EXPECT_EQ(out.prompt_logprobs_start, 1);
  ASSERT_EQ(out.prompt_logprobs.size(), 2u);
  EXPECT_EQ(out.prompt_logprobs[1].top, logprob.top);
}

}  // namespace
}  // namespace switchyard
