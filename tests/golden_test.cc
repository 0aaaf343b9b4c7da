// Every family's fixture against what transformers computed: float32 logits within 1e-4 of the
// largest, over prefill and 16 decode steps, and equal greedy tokens.
//
// The scheduler never carries logits. With num_logprobs = vocab_size it carries all
// log-probabilities of a row, which are the logits less one number per row, their log-sum-exp; the
// test adds the golden row's.
#include "tests/golden.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iostream>

#include "kernels/backend.h"
#include "tests/cell.h"

namespace switchyard {
namespace {

double LogSumExp(std::span<const float> row) {
  const double most = *std::ranges::max_element(row);
  double sum = 0;
  for (float x : row) sum += std::exp(x - most);
  return most + std::log(sum);
}

// One row of all log-probabilities against the golden logits: the largest difference.
double MaxDifference(const TokenLogprob& got, std::span<const float> want) {
  EXPECT_EQ(got.top.size(), want.size());
  const double shift = LogSumExp(want);
  double worst = 0;
  for (const auto& [token, logprob] : got.top) {
    worst = std::max(
        worst, std::abs(static_cast<double>(logprob) + shift - want[static_cast<size_t>(token)]));
  }
  return worst;
}

Request AllLogprobs(std::vector<int32_t> prompt, int32_t max_tokens, int32_t vocab_size) {
  SamplingParams sampling;
  sampling.temperature = 0;
  sampling.num_logprobs = vocab_size;
  sampling.num_prompt_logprobs = vocab_size;
  Request request;
  request.prompt = std::move(prompt);
  request.choices = {sampling};
  request.max_tokens = max_tokens;
  return request;
}

struct GoldenParam {
  std::string fixture;
  std::string isa;
};
void PrintTo(const GoldenParam& param, std::ostream* out) {
  *out << param.fixture << "/" << param.isa;
}

std::vector<GoldenParam> AllParams() {
  std::vector<GoldenParam> params;
  for (const std::string& isa : CpuIsaPaths()) {
    for (const char* fixture :
         {"qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe_tied_bf16", "rope_linear",
          "rope_yarn", "rope_llama3", "rope_dynamic", "norm_topk_prob_false"}) {
      params.push_back({fixture, isa});
    }
  }
  return params;
}

class GoldenTest : public testing::TestWithParam<GoldenParam> {};

TEST_P(GoldenTest, LogitsAndGreedyTokensAreThoseOfTransformers) {
  const std::string dir = FixtureDir(GetParam().fixture);
  const Golden golden = ReadGolden(dir);
  ASSERT_GE(golden.decode_steps, 16);
  CellOptions options;
  options.model_dir = dir;
  options.threads = 2;
  options.dtype = "float32";
  options.isa = GetParam().isa;
  Cell cell(options);
  ASSERT_EQ(cell.model().vocab_size, golden.vocab_size);
  options.max_num_batched_tokens = 1;  // teacher-forced, token by token
  Cell token_by_token(options);

  for (const GoldenCase& c : golden.cases) {
    float largest = 0;
    for (float x : c.logits) largest = std::max(largest, std::abs(x));
    const double bound = 1e-4 * largest;
    double worst = 0;
    const auto compare = [&](const TokenLogprob& got, int32_t position) {
      if (position >= c.first_row)
        worst = std::max(worst, MaxDifference(got, c.Row(position, golden.vocab_size)));
    };
    const auto num_prompt = static_cast<int32_t>(c.prompt.size());

    // Prefill in one chunk, then real decode steps.
    const ChoiceReply reply =
        cell.Run(AllLogprobs(c.prompt, golden.decode_steps + 1, golden.vocab_size))[0];
    ASSERT_TRUE(reply.error.ok()) << reply.error;
    EXPECT_EQ(reply.tokens, c.greedy) << c.name;
    ASSERT_EQ(reply.prompt_logprobs.size(), c.prompt.size() - 1);
    ASSERT_EQ(reply.logprobs.size(), c.greedy.size());
    for (int32_t p = 0; p + 1 < num_prompt; ++p) {
      ASSERT_EQ(reply.prompt_logprobs[static_cast<size_t>(p)].token,
                c.prompt[static_cast<size_t>(p) + 1]);
      compare(reply.prompt_logprobs[static_cast<size_t>(p)], p);
    }
    for (size_t i = 0; i < reply.logprobs.size(); ++i) {
      // A wrong token would feed other inputs than the golden's.
      if (reply.tokens == c.greedy)
        compare(reply.logprobs[i], num_prompt - 1 + static_cast<int32_t>(i));
    }

    // The same rows again, teacher-forced, each token in a step of its own: equal bits.
    std::vector<int32_t> forced = c.prompt;
    forced.insert(forced.end(), c.greedy.begin(), c.greedy.end() - 1);
    const ChoiceReply single = token_by_token.Run(AllLogprobs(forced, 1, golden.vocab_size))[0];
    ASSERT_TRUE(single.error.ok()) << single.error;
    ASSERT_EQ(single.prompt_logprobs.size(), forced.size() - 1);
    for (size_t p = 0; p < single.prompt_logprobs.size(); ++p) {
      compare(single.prompt_logprobs[p], static_cast<int32_t>(p));
      const bool prompt = p < reply.prompt_logprobs.size();
      const TokenLogprob& same =
          prompt ? reply.prompt_logprobs[p] : reply.logprobs[p - reply.prompt_logprobs.size()];
      EXPECT_EQ(single.prompt_logprobs[p].top, same.top) << "position " << p;
    }
    EXPECT_EQ(single.tokens, std::vector<int32_t>{c.greedy.back()});

    EXPECT_LE(worst, bound) << c.name;
    std::cout << c.name << ": largest difference " << worst << " = " << worst / largest
              << " of max |logit|\n";
  }
}

INSTANTIATE_TEST_SUITE_P(Fixtures, GoldenTest, testing::ValuesIn(AllParams()),
                         [](const auto& info) {
                           return info.param.fixture + "_" + info.param.isa;
                         });

}  // namespace
}  // namespace switchyard
