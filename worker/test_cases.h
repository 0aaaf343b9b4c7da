// Requests of the equality tests of cells: random cases, mixed runs and comparison by memcmp. For
// tests only.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/expert_placement.h"
#include "gtest/gtest.h"
#include "worker/test_driver.h"

namespace switchyard {

inline std::vector<int32_t> RandomTokens(size_t n, int32_t vocab, std::mt19937& random) {
  std::vector<int32_t> tokens(n);
  for (int32_t& token : tokens)
    token = static_cast<int32_t>(random() % static_cast<uint32_t>(vocab));
  return tokens;
}

inline bool SameBits(const TokenLogprob& a, const TokenLogprob& b) {
  if (a.token != b.token || std::memcmp(&a.logprob, &b.logprob, 4) != 0 ||
      a.top.size() != b.top.size())
    return false;
  for (size_t i = 0; i < a.top.size(); ++i) {
    if (a.top[i].first != b.top[i].first || std::memcmp(&a.top[i].second, &b.top[i].second, 4) != 0)
      return false;
  }
  return true;
}

inline void ExpectSameBits(const TestOutput& a, const TestOutput& b, const std::string& what) {
  EXPECT_EQ(a.tokens, b.tokens) << what;
  ASSERT_EQ(a.logprobs.size(), b.logprobs.size()) << what;
  for (size_t i = 0; i < a.logprobs.size(); ++i)
    EXPECT_TRUE(SameBits(a.logprobs[i], b.logprobs[i])) << what << " " << i;
  ASSERT_EQ(a.prompt_logprobs.size(), b.prompt_logprobs.size()) << what;
  for (size_t i = 0; i < a.prompt_logprobs.size(); ++i) {
    EXPECT_TRUE(SameBits(a.prompt_logprobs[i], b.prompt_logprobs[i])) << what << " prompt " << i;
  }
}

inline std::unique_ptr<LocalCell> MakeCell(const CellOptions& options) {
  absl::StatusOr<std::unique_ptr<LocalCell>> cell = LocalCell::Create(options);
  EXPECT_TRUE(cell.ok()) << cell.status();
  return cell.ok() ? *std::move(cell) : nullptr;
}

// A request of the equality tests: prompt and sampling parameters, drawn once.
struct Case {
  std::vector<int32_t> prompt;
  SamplingParams sampling;
  size_t num_tokens = 0;
};

inline void ExpectSameBits(const std::vector<TestOutput>& want, const std::vector<TestOutput>& got,
                           const std::string& what) {
  ASSERT_EQ(want.size(), got.size()) << what;
  for (size_t i = 0; i < want.size(); ++i)
    ExpectSameBits(want[i], got[i], absl::StrCat(what, " case ", i));
}

// The reference: each case alone, its prompt in one chunk.
inline std::vector<TestOutput> RunAlone(TestDriver& driver, const std::vector<Case>& cases) {
  std::vector<TestOutput> outputs;
  for (const Case& c : cases)
    outputs.push_back(driver.Generate(c.prompt, c.sampling, c.num_tokens, 256));
  return outputs;
}

inline std::vector<Case> RandomCases(size_t n, const ModelInfo& model, std::mt19937& random) {
  std::vector<Case> cases(n);
  for (size_t i = 0; i < n; ++i) {
    cases[i].prompt = RandomTokens(1 + random() % 90, model.vocab_size, random);
    cases[i].num_tokens = 4 + random() % 8;
    SamplingParams& s = cases[i].sampling;
    s.temperature = i % 2 == 0 ? 0.0f : 1.0f;
    s.seed = random();
    s.top_p = 0.95f;
    s.repetition_penalty = 1.1f;
    s.num_logprobs = 3;
    if (i % 3 == 0) s.num_prompt_logprobs = 2;
  }
  return cases;
}

inline std::shared_ptr<const ExpertPlacement> RandomPlacement(const ModelInfo& model,
                                                              int32_t num_ranks,
                                                              std::mt19937& random) {
  std::vector<std::vector<std::vector<int32_t>>> hosts(static_cast<size_t>(model.num_moe_layers));
  for (auto& layer : hosts) {
    layer.resize(static_cast<size_t>(model.num_experts));
    for (std::vector<int32_t>& expert : layer) {
      for (int32_t r = 0; r < num_ranks; ++r) {
        if (random() % 3 == 0) expert.push_back(r);
      }
      if (expert.empty())
        expert.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(num_ranks)));
    }
  }
  absl::StatusOr<ExpertPlacement> placement = ExpertPlacement::Create(num_ranks, std::move(hosts));
  EXPECT_TRUE(placement.ok()) << placement.status();
  return std::make_shared<ExpertPlacement>(*std::move(placement));
}

// All cases at once, in random chunks, on random workers and in one or two micro-batches;
// `after_step` is called after each step.
inline std::vector<TestOutput> RunMixed(TestDriver& driver, const std::vector<Case>& cases,
                                        std::mt19937& random,
                                        const std::function<void()>& after_step = nullptr) {
  std::vector<SequenceId> ids;
  for (const Case& c : cases) {
    ids.push_back(driver.Add(
        static_cast<int>(random() % static_cast<uint32_t>(driver.target().num_attention_workers)),
        c.prompt, c.sampling));
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (size_t i = 0; i < cases.size(); ++i) {
      if (driver.output(ids[i]).tokens.size() >= cases[i].num_tokens) continue;
      busy = true;
      if (random() % 4 != 0) driver.Plan(ids[i], 1 + static_cast<int32_t>(random() % 20));
    }
    if (!busy) break;
    driver.Plan(
        driver.Add(0, RandomTokens(3, driver.target().model.vocab_size, random), SamplingParams{}),
        3);  // a guest
    driver.SetMicroBatches(1 + random() % 2);
    const std::string error = driver.Step();
    EXPECT_EQ(error, "");
    if (!error.empty()) break;
    if (after_step) after_step();
  }
  std::vector<TestOutput> outputs;
  for (SequenceId id : ids) outputs.push_back(driver.output(id));
  return outputs;
}

}  // namespace switchyard
