// The demo model against what transformers computed from it (models/demo/golden.json, written by
// train/golden.py):
//   float32    greedy tokens of 50 prompts (one may differ only where the reference's margin is
//   below 1e-4), the
//              largest next-token logits of some prompts, perplexity of held-out text to 3 digits
//   bfloat16   close: see the bound below
//   int8, int4 perplexity against bfloat16's
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "tests/cell.h"

namespace switchyard {
namespace {

using nlohmann::json;

// Where transformers' best two logits are closer than this, rounding may swap them.
constexpr double kMargin = 1e-4;

class DemoGoldenTest : public testing::Test {
 protected:
  DemoGoldenTest() {
    std::ifstream file(DemoDir() + "/golden.json");
    SY_CHECK(file.good());
    golden_ = json::parse(file);
  }

  static CellOptions Options(const std::string& dtype) {
    CellOptions options;
    options.model_dir = DemoDir();
    options.expert_workers = 2;
    options.threads = 2;
    options.dtype = dtype;
    return options;
  }

  static Request Greedy(const json& ids, int32_t max_tokens) {
    SamplingParams sampling;
    sampling.temperature = 0;
    Request request;
    request.prompt = ids.get<std::vector<int32_t>>();
    request.choices = {sampling};
    request.max_tokens = max_tokens;
    return request;
  }

  struct Perplexity {
    std::vector<double> window_nll;  // mean over a window's tokens but the first
    double nll = 0;                  // mean over all tokens
  };
  Perplexity Measure(Cell& cell) const {
    Perplexity result;
    double total = 0, tokens = 0;
    for (const json& window : golden_.at("perplexity").at("windows")) {
      Request request = Greedy(window, 0);
      request.choices[0].num_prompt_logprobs = 0;
      const ChoiceReply reply = cell.Run(request)[0];
      EXPECT_TRUE(reply.error.ok()) << reply.error;
      EXPECT_EQ(reply.prompt_logprobs.size(), window.size() - 1);
      double nll = 0;
      for (const TokenLogprob& logprob : reply.prompt_logprobs)
        nll -= static_cast<double>(logprob.logprob);
      total += nll;
      tokens += static_cast<double>(reply.prompt_logprobs.size());
      result.window_nll.push_back(nll / static_cast<double>(reply.prompt_logprobs.size()));
    }
    result.nll = total / tokens;
    return result;
  }

  json golden_;
};

TEST_F(DemoGoldenTest, GreedyTokensInFloat32AreThoseOfTransformers) {
  ASSERT_GE(golden_.at("prompts").size(), 50u);
  Cell cell(Options("float32"));
  std::vector<Cell::Submitted> running;
  for (const json& prompt : golden_.at("prompts")) {
    const auto max_tokens = static_cast<int32_t>(prompt.at("tokens").size());
    running.push_back(*cell.Submit(Greedy(prompt.at("ids"), max_tokens)));
  }
  int num_positions = 0, num_excused = 0;
  for (size_t i = 0; i < running.size(); ++i) {
    const json& prompt = golden_.at("prompts")[i];
    const auto want = prompt.at("tokens").get<std::vector<int32_t>>();
    const std::vector<int32_t> got = running[i].reply->Wait()[0].tokens;
    ASSERT_EQ(got.size(), want.size());
    const auto [at, unused] = std::ranges::mismatch(got, want);
    num_positions += static_cast<int>(at - got.begin());
    if (at == got.end()) continue;
    // From here on the two continue different texts.
    const double margin = prompt.at("margins").at(static_cast<size_t>(at - got.begin()));
    EXPECT_LT(margin, kMargin) << "prompt " << i << " position " << at - got.begin();
    ++num_excused;
  }
  std::cout << num_positions << " equal tokens; " << num_excused << " of " << running.size()
            << " prompts differ from a margin below " << kMargin << " on\n";
}

TEST_F(DemoGoldenTest, LargestLogitsInFloat32AreThoseOfTransformers) {
  Cell cell(Options("float32"));
  for (const json& last : golden_.at("last_logits")) {
    const json& top = last.at("top");
    Request request = Greedy(last.at("ids"), 1);
    request.choices[0].num_logprobs = cell.model().vocab_size;
    const ChoiceReply reply = cell.Run(request)[0];
    ASSERT_EQ(reply.logprobs.size(), 1u);
    std::vector<double> logprobs(static_cast<size_t>(cell.model().vocab_size));
    for (const auto& [token, logprob] : reply.logprobs[0].top)
      logprobs[static_cast<size_t>(token)] = logprob;
    // Logits relative to the best one; log-probabilities differ from logits by one number per row.
    const double best = top[0][1];
    for (const json& entry : top) {
      const double want = entry[1].get<double>() - best;
      const double got = logprobs[entry[0].get<size_t>()] - logprobs[top[0][0].get<size_t>()];
      EXPECT_NEAR(got, want, 1e-4 * std::abs(best)) << "token " << entry[0];
    }
  }
}

TEST_F(DemoGoldenTest, PerplexityInFloat32IsEqualToThreeDigits) {
  Cell cell(Options("float32"));
  const Perplexity got = Measure(cell);
  const json& want = golden_.at("perplexity").at("float32");
  const double perplexity = want.at("perplexity");
  EXPECT_NEAR(std::exp(got.nll), perplexity, 5e-4 * perplexity);
  for (size_t i = 0; i < got.window_nll.size(); ++i) {
    EXPECT_NEAR(got.window_nll[i], want.at("window_nll").at(i).get<double>(), 5e-4)
        << "window " << i;
  }
  std::cout << "perplexity " << std::exp(got.nll) << ", transformers " << perplexity << "\n";
}

// bfloat16 keeps 8 bits: rounding an activation changes it by up to 2^-9 of itself. We round less
// often than transformers (our residual stream and sums are float32), in other places, so neither
// is the other's reference: float32 is. The bound is three times transformers' own distance from
// float32, and at least 2^-8 of the value, which is what rounding the logits once could do.
TEST_F(DemoGoldenTest, PerplexityInBfloat16IsClose) {
  Cell cell(Options("bfloat16"));
  const Perplexity got = Measure(cell);
  const json& exact = golden_.at("perplexity").at("float32");
  const json& theirs = golden_.at("perplexity").at("bfloat16");
  const auto check = [](double ours, double exact_nll, double their_nll, const std::string& what) {
    const double bound = std::max(3 * std::abs(their_nll - exact_nll), exact_nll / 256);
    EXPECT_NEAR(ours, exact_nll, bound) << what;
    std::cout << what << ": float32 " << exact_nll << ", bfloat16 ours " << ours
              << ", transformers " << their_nll << "\n";
  };
  check(got.nll, exact.at("nll"), theirs.at("nll"), "all");
  for (size_t i = 0; i < got.window_nll.size(); ++i) {
    check(got.window_nll[i], exact.at("window_nll").at(i), theirs.at("window_nll").at(i),
          "window " + std::to_string(i));
  }
}

// Weights quantised when loaded cost int8 at most 0.5 % and int4 at most 3 % of the perplexity that
// the same model has in bfloat16.
TEST_F(DemoGoldenTest, PerplexityOfQuantisedWeightsIsNearBfloat16) {
  Cell plain(Options("bfloat16"));
  const double want = std::exp(Measure(plain).nll);
  for (const auto& [quantization, bound] : {std::pair{"int8", 0.005}, {"int4", 0.03}}) {
    CellOptions options = Options("bfloat16");
    options.formats.quantization = quantization;
    Cell cell(options);
    const double got = std::exp(Measure(cell).nll);
    EXPECT_LE(std::abs(got / want - 1), bound) << quantization;
    std::cout << quantization << ": perplexity " << got << ", bfloat16 " << want << ", "
              << 100 * (got / want - 1) << " %\n";
  }
}

}  // namespace
}  // namespace switchyard
