// Single scenarios through scheduler and workers: what bits_test.cc meets by chance happens here
// for certain.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "comm/test_problems.h"
#include "tests/cell.h"

namespace switchyard {
namespace {

CellOptions Workers(int attention_workers, int expert_workers) {
  CellOptions options;
  options.model_dir = FixtureDir("qwen3_moe");
  options.attention_workers = attention_workers;
  options.expert_workers = expert_workers;
  options.threads = 2;
  options.max_num_seqs = 32;
  options.max_num_batched_tokens = 64;
  return options;
}

Request MakeRequest(std::mt19937& rng, int32_t prompt_tokens, int32_t max_tokens,
                    float temperature) {
  SamplingParams sampling;
  sampling.temperature = temperature;
  sampling.seed = rng();
  sampling.num_logprobs = 3;
  Request request;
  for (int32_t i = 0; i < prompt_tokens; ++i) request.prompt.push_back(Below(rng, 300));
  request.choices = {sampling};
  request.max_tokens = max_tokens;
  return request;
}

TEST(Scenario, CancelledRequestsLeaveTheOthersAlone) {
  std::mt19937 rng = SeededRng();
  std::vector<Request> kept;
  std::vector<std::string> want;
  {
    Cell alone(Workers(1, 1));
    for (int i = 0; i < 6; ++i) {
      kept.push_back(MakeRequest(rng, 5 + Below(rng, 60), 40, i % 2 == 0 ? 0.0f : 1.0f));
      want.push_back(alone.Run(kept.back())[0].Bits());
    }
  }
  Cell cell(Workers(2, 3));
  std::vector<Cell::Submitted> running, doomed;
  for (const Request& request : kept) {
    running.push_back(*cell.Submit(request));
    doomed.push_back(*cell.Submit(MakeRequest(rng, 1 + Below(rng, 100), 400, 1.0f)));
  }
  for (size_t i = 0; i < doomed.size(); ++i) {
    // One while it is prefilled or waits, the others in the middle of decoding.
    if (i > 0) doomed[i].reply->WaitForTokens(0, static_cast<size_t>(Below(rng, 20)));
    cell.Cancel(doomed[i].id);
  }
  for (size_t i = 0; i < running.size(); ++i)
    EXPECT_TRUE(running[i].reply->Wait()[0].Bits() == want[i]) << i;
  cell.Drain();
  EXPECT_EQ(cell.Stats().kv_usage, 0);
  const auto cut = std::ranges::count_if(doomed, [](const Cell::Submitted& submitted) {
    return submitted.reply->Now()[0].reason == FinishReason::kNone;  // cancels have no event
  });
  EXPECT_GT(cut, 0) << "all ran to their end before the cancel came";
}

TEST(Scenario, EachOfNChoicesIsTheRequestWithThatChoiceAlone) {
  std::mt19937 rng = SeededRng();
  Cell cell(Workers(2, 3));
  Request request = MakeRequest(rng, 40, 12, 1.0f);
  for (uint32_t choice = 1; choice < 5; ++choice) {
    request.choices.push_back(request.choices[0]);
    request.choices.back().choice = choice;
  }
  const std::vector<ChoiceReply> together = cell.Run(request);
  ASSERT_EQ(together.size(), 5u);
  Cell alone(Workers(1, 1));
  for (size_t choice = 0; choice < 5; ++choice) {
    Request single = request;
    single.choices = {request.choices[choice]};
    EXPECT_EQ(alone.Run(single)[0].Bits(), together[choice].Bits()) << "choice " << choice;
    for (size_t other = 0; other < choice; ++other) {
      EXPECT_NE(together[choice].tokens, together[other].tokens)
          << "same seed, other random numbers";
    }
  }
}

TEST(Scenario, ACancelledChoiceLeavesItsSiblingsAlone) {
  std::mt19937 rng = SeededRng();
  Request request = MakeRequest(rng, 20, 60, 1.0f);
  request.choices.push_back(request.choices[0]);
  request.choices.back().choice = 1;
  Request only = request;
  only.choices = {request.choices[1]};
  Cell cell(Workers(1, 2));
  const std::string want = cell.Run(only)[0].Bits();
  const Cell::Submitted submitted = *cell.Submit(request);
  submitted.reply->WaitForTokens(0, 3);
  cell.CancelChoice(submitted.id, 0);
  cell.Drain();
  EXPECT_EQ(submitted.reply->Now()[1].Bits(), want);
}

TEST(Scenario, APrefixCacheHitGivesTheSameBits) {
  std::mt19937 rng = SeededRng();
  const Request request = MakeRequest(rng, 120, 10, 0.8f);
  Cell cell(Workers(1, 2));
  const ChoiceReply first = cell.Run(request)[0];
  EXPECT_EQ(first.cached_tokens, 0);
  const ChoiceReply second = cell.Run(request)[0];
  EXPECT_GE(second.cached_tokens, 120 - 2 * cell.model().block_size);
  EXPECT_EQ(second.Bits(), first.Bits());
  Request salted = request;
  salted.cache_salt = "another tenant";
  const ChoiceReply third = cell.Run(salted)[0];
  EXPECT_EQ(third.cached_tokens, 0);
  EXPECT_EQ(third.Bits(), first.Bits());
}

TEST(Scenario, PreemptedSequencesGiveTheSameBits) {
  std::mt19937 rng = SeededRng();
  std::vector<Request> requests;
  for (int i = 0; i < 8; ++i)
    requests.push_back(MakeRequest(rng, 30 + Below(rng, 40), 60, i % 2 == 0 ? 0.0f : 1.2f));
  CellOptions options = Workers(1, 2);
  options.max_model_len = 160;
  std::vector<std::string> want;
  {
    Cell roomy(options);
    for (const Request& request : requests) want.push_back(roomy.Run(request)[0].Bits());
    EXPECT_EQ(roomy.Stats().preemptions, 0u);
    const ModelInfo& model = roomy.model();
    options.kv_cache_memory = 11 * model.block_size * model.kv_bytes_per_token;
    ASSERT_LE(160, 11 * model.block_size);
  }
  Cell tight(options);
  std::vector<Cell::Submitted> running;
  for (const Request& request : requests) running.push_back(*tight.Submit(request));
  for (size_t i = 0; i < running.size(); ++i)
    EXPECT_TRUE(running[i].reply->Wait()[0].Bits() == want[i]) << i;
  EXPECT_GT(tight.Stats().preemptions, 0u);
  std::cout << tight.Stats().preemptions << " preemptions\n";
}

}  // namespace
}  // namespace switchyard
