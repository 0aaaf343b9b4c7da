// Sampling: exact cases, the distribution by chi-square, extreme parameters, planted NaNs, and the
// independence of rows, on every path.
#include <map>

#include "kernels/philox.h"
#include "kernels/test_support.h"

namespace switchyard::testing {
namespace {

class SamplerTest : public EveryPath {
 protected:
  SampledToken One(std::vector<float> logits, const SamplingRow& row) {
    SampledToken out;
    backend_->Sample(Tensor(logits.data(), DType::kF32, {1, static_cast<int64_t>(logits.size())}),
                     {&row, 1}, {&out, 1});
    return out;
  }
  PooledBackend backend_ = MakeBackend(GetParam(), 2);
};
SY_EVERY_PATH(SamplerTest);

constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(PhiloxTest, KnownAnswers) {  // from the authors' Random123 distribution, kat_vectors
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}),
            (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (std::array<uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(SamplingRowTest, OnlyPlainGreedyRowsAreArgmax) {
  const int32_t banned[] = {1};
  const std::pair<int32_t, float> bias[] = {{2, 0.5f}};
  const auto changed = [](const auto& change) {
    SamplingRow row;
    row.temperature = 0.0f;
    change(row);
    return row.IsArgmax();
  };
  EXPECT_TRUE(changed([](SamplingRow&) {}));
  EXPECT_TRUE(changed([](SamplingRow& r) { r.top_k = 3; }));
  EXPECT_FALSE(changed([](SamplingRow& r) { r.temperature = SamplingRow::kGreedyTemperature; }));
  EXPECT_FALSE(changed([&](SamplingRow& r) { r.logit_bias = bias; }));
  EXPECT_FALSE(changed([&](SamplingRow& r) { r.banned = banned; }));
  EXPECT_FALSE(changed([](SamplingRow& r) { r.repetition_penalty = 1.1f; }));
  EXPECT_FALSE(changed([](SamplingRow& r) { r.presence_penalty = 0.1f; }));
  EXPECT_FALSE(changed([](SamplingRow& r) { r.frequency_penalty = 0.1f; }));
  EXPECT_FALSE(changed([](SamplingRow& r) { r.num_top_logprobs = 0; }));
}

TEST_P(SamplerTest, GreedyTakesTheHighestAndTiesGoToTheLowerId) {
  SamplingRow row;
  row.temperature = 0.0f;
  EXPECT_EQ(One({1, 3, 2}, row).token, 1);
  std::vector<float> logits(1000, -1.0f);
  logits[977] = logits[501] = 4.0f;
  EXPECT_EQ(One(logits, row).token, 501);
  EXPECT_EQ(One({-kInf, -kInf, -5}, row).token, 2);
}

TEST_P(SamplerTest, BiasPenaltiesAndBans) {
  SamplingRow row;
  row.temperature = 0.0f;
  const std::pair<int32_t, float> bias[] = {{2, 100.0f}, {1, -100.0f}, {-1, 5.0f}, {1000000, 5.0f}};
  row.logit_bias = bias;
  EXPECT_EQ(One({1, 3, 2}, row).token, 2);
  row.logit_bias = {};

  const int32_t banned[] = {1, 99, -3};
  row.banned = banned;
  EXPECT_EQ(One({1, 3, 2}, row).token, 2);
  row.banned = {};

  const int32_t seen[] = {1, 1, 500};
  row.prompt = seen;
  row.repetition_penalty = 2.0f;  // once, however often it was seen: 3 / 2
  EXPECT_EQ(One({1, 3, 1.4f}, row).token, 1);
  EXPECT_EQ(One({1, 3, 1.6f}, row).token, 2);
  EXPECT_EQ(One({-5, -1, -1.9f}, row).token, 2);  // negative: multiplied
  row.presence_penalty = 1.5f;                    // the prompt does not count here
  row.repetition_penalty = 1.0f;
  EXPECT_EQ(One({1, 3, 2}, row).token, 1);
  row.generated = seen;
  EXPECT_EQ(One({1, 3, 2}, row).token, 2);
  EXPECT_EQ(One({1, 3, 1.4f}, row).token, 1);
  row.presence_penalty = 0.0f;
  row.frequency_penalty = 0.7f;  // twice
  EXPECT_EQ(One({1, 3, 1.7f}, row).token, 2);
  EXPECT_EQ(One({1, 3, 1.5f}, row).token, 1);
}

TEST_P(SamplerTest, NonFiniteLogitsFailTheirRowOnly) {
  constexpr int64_t kVocab = 37;
  for (int64_t at : {0, 15, 16, 31, 32, 36}) {
    for (float bad : {NAN, kInf, -NAN}) {
      std::vector<float> logits(3 * kVocab, 0.5f);
      logits[static_cast<size_t>(kVocab + at)] = bad;
      std::vector<SamplingRow> rows(3);
      rows[1].temperature = at % 2 == 0 ? 0.0f : 1.0f;
      for (SamplingRow& r : rows) r.num_top_logprobs = 2;
      std::vector<SampledToken> out(3);
      backend_->Sample(Tensor(logits.data(), DType::kF32, {3, kVocab}), rows, out);
      EXPECT_TRUE(out[0].finite && out[2].finite);
      EXPECT_FALSE(out[1].finite);
      EXPECT_EQ(out[1].token, -1);
      EXPECT_GE(out[0].token, 0);
      const std::vector<int32_t> targets = {1, 2, 3};
      backend_->Score(Tensor(logits.data(), DType::kF32, {3, kVocab}), targets, 1, out);
      EXPECT_TRUE(out[0].finite && out[2].finite);
      EXPECT_FALSE(out[1].finite);
    }
  }
  SamplingRow row;
  EXPECT_FALSE(One(std::vector<float>(20, -kInf), row).finite);
  const int32_t all[] = {0, 1};
  row.banned = all;
  EXPECT_FALSE(One({1, 2}, row).finite);
}

TEST_P(SamplerTest, ExtremeParametersGiveALegalToken) {
  Random random(TestSeed());
  const std::pair<int32_t, float> bias[] = {{3, 100.0f}, {4, -100.0f}};
  for (size_t vocab : {1, 2, 15, 50, 3000}) {
    std::vector<float> logits;
    for (size_t i = 0; i < vocab; ++i) logits.push_back(random.Float(-20, 20));
    for (float temperature :
         {0.0f, 1e-38f, 1e-6f, 1e-5f, 1.1e-5f, 1e-3f, 1.0f, 100.0f, 1e30f, 3e38f})
      for (float top_p : {0.0f, 1e-30f, 0.5f, 0.999999f, 1.0f})
        for (int32_t top_k : {0, 1, 7, 1000000})
          for (float min_p : {0.0f, 1e-30f, 0.3f, 1.0f}) {
            SamplingRow row;
            row.temperature = temperature;
            row.top_p = top_p;
            row.top_k = top_k;
            row.min_p = min_p;
            row.seed = random.engine()();
            row.logit_bias = bias;
            row.repetition_penalty = 1e-6f;
            const SampledToken t = One(logits, row);
            ASSERT_TRUE(t.finite);
            ASSERT_GE(t.token, 0);
            ASSERT_LT(t.token, static_cast<int32_t>(vocab));
            if (top_p <= 1e-30f || top_k == 1 || (min_p == 1.0f && temperature <= 1.0f) ||
                temperature < 1e-4f) {
              SamplingRow greedy = row;
              greedy.temperature = 0.0f;
              ASSERT_EQ(t.token, One(logits, greedy).token) << "temperature " << temperature;
            }
          }
  }
}

TEST_P(SamplerTest, TokensOutsideTheCutNeverComeAndTheRestFollowTheDistribution) {
  constexpr int kDraws = 20000;
  Random random(11);  // fixed: the bound below is a 1e-6 quantile
  std::vector<float> logits;
  for (int i = 0; i < 40; ++i) logits.push_back(random.Float(-2, 3));
  const int32_t generated[] = {3, 3, 8};
  const int32_t prompt[] = {5, 6};
  const std::pair<int32_t, float> bias[] = {{0, 1.5f}, {7, -2.0f}};
  std::vector<SamplingRow> cases(8);
  cases[1].temperature = 0.6f;
  cases[2].top_k = 5;
  cases[3].top_p = 0.7f;
  cases[4].min_p = 0.2f;
  cases[5].top_k = 12, cases[5].top_p = 0.8f, cases[5].temperature = 1.7f;
  cases[6].min_p = 0.05f, cases[6].top_p = 0.9f, cases[6].logit_bias = bias;
  cases[7].repetition_penalty = 1.5f, cases[7].presence_penalty = 0.5f,
  cases[7].frequency_penalty = 0.3f;
  cases[7].prompt = prompt, cases[7].generated = generated, cases[7].min_p = 0.02f,
  cases[7].top_k = 30;
  for (size_t c = 0; c < cases.size(); ++c) {
    std::vector<int> counts(logits.size(), 0);
    for (int i = 0; i < kDraws; ++i) {
      SamplingRow row = cases[c];
      row.seed = 1234 + c;
      row.position = i;
      ++counts[static_cast<size_t>(One(logits, row).token)];
    }
    const std::vector<double> p = reference::TokenProbabilities(logits, cases[c]);
    double chi2 = 0.0;
    int cells = 0;
    for (size_t i = 0; i < p.size(); ++i) {
      if (p[i] == 0.0) {
        ASSERT_EQ(counts[i], 0) << "case " << c << " token " << i;
        continue;
      }
      const double want = p[i] * kDraws;
      chi2 += (counts[i] - want) * (counts[i] - want) / want;
      ++cells;
    }
    // Mean cells - 1, deviation sqrt(2 (cells - 1)).
    EXPECT_LT(chi2, cells - 1 + 6.0 * std::sqrt(2.0 * cells))
        << "case " << c << ", " << cells << " tokens";
  }
}

// The nucleus of a flat distribution is larger than the first sorts reach.
TEST_P(SamplerTest, FlatDistributionWithTopP) {
  std::vector<float> logits(5000);
  Random random(12);
  for (float& x : logits) x = random.Float(0.0f, 0.01f);
  SamplingRow row;
  row.top_p = 0.5f;
  const std::vector<double> p = reference::TokenProbabilities(logits, row);
  for (int i = 0; i < 300; ++i) {
    row.position = i;
    EXPECT_GT(p[static_cast<size_t>(One(logits, row).token)], 0.0);
  }
}

TEST_P(SamplerTest, EveryPartOfTheKeyChangesTheDraw) {
  const std::vector<float> logits(4096, 0.0f);
  std::map<int32_t, int> seen;
  SamplingRow row;
  ++seen[One(logits, row).token];
  row.seed = 1;
  ++seen[One(logits, row).token];
  row.seed = uint64_t{1} << 40;
  ++seen[One(logits, row).token];
  row.choice = 1;
  ++seen[One(logits, row).token];
  row.position = 1;
  ++seen[One(logits, row).token];
  row.position = int64_t{1} << 40;
  ++seen[One(logits, row).token];
  EXPECT_EQ(seen.size(), 6u);
  EXPECT_EQ(One(logits, row).token, One(logits, row).token);
}

TEST_P(SamplerTest, LogprobsAreOfTheRawLogits) {
  Random random(TestSeed());
  for (size_t vocab : {1, 17, 1000, 50304}) {
    std::vector<float> logits;
    for (size_t i = 0; i < vocab; ++i) logits.push_back(random.Float(-15, 15));
    if (vocab > 5) logits[5] = logits[3] = 16.0f;  // a tie at the top
    const std::vector<double> want = reference::LogSoftmax(logits);
    SamplingRow row;
    const std::pair<int32_t, float> bias[] = {{0, 50.0f}};
    row.logit_bias = bias;
    row.num_top_logprobs = 5;
    const SampledToken t = One(logits, row);
    EXPECT_EQ(t.token, 0);
    EXPECT_NEAR(t.logprob, want[0], 4e-6);
    ASSERT_EQ(t.top.size(), std::min<size_t>(5, vocab));
    for (size_t i = 0; i < t.top.size(); ++i) {
      EXPECT_NEAR(t.top[i].second, want[static_cast<size_t>(t.top[i].first)], 4e-6);
      EXPECT_LE(t.top[i].second, t.top[i > 0 ? i - 1 : 0].second);
    }
    if (vocab > 5) {
      EXPECT_EQ(t.top[0].first, 3);
      EXPECT_EQ(t.top[1].first, 5);
    }
    SampledToken scored;
    const int32_t target = static_cast<int32_t>(vocab - 1);
    backend_->Score(Tensor(logits.data(), DType::kF32, {1, static_cast<int64_t>(vocab)}),
                    {&target, 1}, 0, {&scored, 1});
    EXPECT_EQ(scored.token, target);
    EXPECT_NEAR(scored.logprob, want.back(), 4e-6);
    EXPECT_TRUE(scored.top.empty());
    row.num_top_logprobs = -1;
    EXPECT_TRUE(One(logits, row).top.empty());
  }
}

TEST_P(SamplerTest, RowsDoNotDependOnTheBatchOrThreads) {
  Random random(TestSeed());
  constexpr int64_t kRows = 33, kVocab = 1003;
  const Guarded logits = random.Normal(DType::kF32, {kRows, kVocab}, 3.0f);
  const int32_t ids[] = {1, 2, 3, 3, 700};
  std::vector<SamplingRow> rows(kRows);
  for (SamplingRow& r : rows) {
    r.temperature = random.Int(0, 3) == 0 ? 0.0f : random.Float(0.3f, 2.0f);
    r.top_p = random.Int(0, 1) == 0 ? 1.0f : random.Float(0.1f, 1.0f);
    r.top_k = random.Int(0, 1) == 0 ? 0 : static_cast<int32_t>(random.Int(1, 100));
    r.min_p = random.Int(0, 1) == 0 ? 0.0f : 0.01f;
    r.repetition_penalty = random.Int(0, 1) == 0 ? 1.0f : 1.3f;
    r.generated = ids;
    r.presence_penalty = 0.5f;
    r.seed = random.engine()();
    r.num_top_logprobs = 3;
  }
  std::vector<SampledToken> want(kRows);
  MakeBackend(GetParam(), 1)->Sample(logits.t(), rows, want);
  for (int threads : {1, 2, 5}) {
    const PooledBackend backend = MakeBackend(GetParam(), threads);
    for (int64_t size : {1, 2, 7, 33}) {
      for (int64_t begin = 0; begin + size <= kRows; begin += size) {
        std::vector<SampledToken> out(static_cast<size_t>(size));
        backend->Sample(
            logits.Rows(begin, begin + size),
            std::span(rows).subspan(static_cast<size_t>(begin), static_cast<size_t>(size)), out);
        for (int64_t i = 0; i < size; ++i) {
          const SampledToken& a = want[static_cast<size_t>(begin + i)];
          const SampledToken& b = out[static_cast<size_t>(i)];
          EXPECT_EQ(a.token, b.token);
          EXPECT_EQ(0, std::memcmp(&a.logprob, &b.logprob, 4));
          EXPECT_EQ(a.top, b.top);
        }
      }
    }
  }
}

}  // namespace
}  // namespace switchyard::testing
