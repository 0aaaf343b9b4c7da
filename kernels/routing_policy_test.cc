// The router's steps one by one, against the reference on random rows, and with planted ties and
// NaNs.
#include "kernels/routing_policy.h"

#include "kernels/test_support.h"

namespace switchyard::testing {
namespace {

struct Result {
  std::vector<int32_t> ids;
  std::vector<float> weights;
  std::vector<int32_t> counts;
};

Result Route(const RoutingPolicy& policy, std::vector<float> logits,
             std::vector<uint32_t> profiles = {}) {
  const size_t experts = static_cast<size_t>(policy.config().num_experts);
  const size_t tokens = logits.size() / experts, k = static_cast<size_t>(policy.config().top_k);
  profiles.resize(tokens, 0);
  Result r{std::vector<int32_t>(tokens * k, 77), std::vector<float>(tokens * k, 77.0f),
           std::vector<int32_t>(tokens, 77)};
  RoutingPolicy::Scratch scratch;
  policy.Route(Tensor(logits.data(), DType::kF32,
                      {static_cast<int64_t>(tokens), policy.config().num_experts}),
               profiles, &scratch, r.ids, r.weights, r.counts);
  return r;
}

TEST(RoutingPolicyTest, SoftmaxThenTopK) {
  const RoutingPolicy policy({.num_experts = 4, .top_k = 2});
  const Result r = Route(policy, {0.0f, std::log(2.0f), std::log(5.0f), 0.0f});
  EXPECT_EQ(r.ids, (std::vector<int32_t>{2, 1}));
  EXPECT_FLOAT_EQ(r.weights[0], 5.0f / 9);
  EXPECT_FLOAT_EQ(r.weights[1], 2.0f / 9);
}

TEST(RoutingPolicyTest, RenormalizeAndScale) {
  const RoutingPolicy policy(
      {.num_experts = 4, .top_k = 2, .renormalize = true, .routed_scaling = 3.0f});
  const Result r = Route(policy, {0.0f, std::log(2.0f), std::log(5.0f), 0.0f});
  EXPECT_FLOAT_EQ(r.weights[0], 15.0f / 7);
  EXPECT_FLOAT_EQ(r.weights[1], 6.0f / 7);
}

TEST(RoutingPolicyTest, SoftmaxAfterTopKEqualsRenormalizing) {
  const std::vector<float> logits = {0.3f, -1.0f, 2.0f, 1.7f, -0.2f};
  const Result a =
      Route(RoutingPolicy({.num_experts = 5, .top_k = 3, .softmax_after_topk = true}), logits);
  const Result b =
      Route(RoutingPolicy({.num_experts = 5, .top_k = 3, .renormalize = true}), logits);
  EXPECT_EQ(a.ids, b.ids);
  for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(a.weights[i], b.weights[i], 1e-7);
}

TEST(RoutingPolicyTest, Sigmoid) {
  const RoutingPolicy policy({.num_experts = 3, .top_k = 2, .score = RouterScore::kSigmoid});
  const Result r = Route(policy, {0.0f, -2.0f, 1.0f});
  EXPECT_EQ(r.ids, (std::vector<int32_t>{2, 0}));
  EXPECT_FLOAT_EQ(r.weights[0], 1.0f / (1.0f + std::exp(-1.0f)));
  EXPECT_FLOAT_EQ(r.weights[1], 0.5f);
}

TEST(RoutingPolicyTest, TiesGoToTheLowerId) {
  const RoutingPolicy policy({.num_experts = 6, .top_k = 3});
  EXPECT_EQ(Route(policy, {1, 2, 2, 1, 2, 2}).ids, (std::vector<int32_t>{1, 2, 4}));
  EXPECT_EQ(Route(policy, {0, 0, 0, 0, 0, 0}).ids, (std::vector<int32_t>{0, 1, 2}));
}

TEST(RoutingPolicyTest, BiasSelectsButDoesNotWeigh) {
  const RoutingPolicy policy({.num_experts = 3, .top_k = 1},
                             {{}, {.allowed = {}, .selection_bias = {10, 0, 0}}});
  const Result r = Route(policy, {0, 0, 1, 0, 0, 1}, {0, 1});
  EXPECT_EQ(r.ids, (std::vector<int32_t>{2, 0}));
  const float sum = 2.0f + std::exp(1.0f);
  EXPECT_FLOAT_EQ(r.weights[1], 1.0f / sum);
}

TEST(RoutingPolicyTest, MaskedExpertsNeverComeAndCountShrinks) {
  const RoutingPolicy policy({.num_experts = 4, .top_k = 3, .renormalize = true},
                             {{},
                              {.allowed = {0, 1, 0, 1}, .selection_bias = {}},
                              {.allowed = {0, 0, 0, 0}, .selection_bias = {}}});
  const Result r = Route(policy, {5, 1, 4, 1, 5, 1, 4, 1, 5, 1, 4, 1}, {1, 2, 0});
  EXPECT_EQ(r.ids, (std::vector<int32_t>{1, 3, -1, -1, -1, -1, 0, 2, 1}));
  EXPECT_EQ(r.counts, (std::vector<int32_t>{2, 0, 3}));
  EXPECT_EQ(r.weights[0], 0.5f);
  EXPECT_EQ(r.weights[2], 0.0f);
}

TEST(RoutingPolicyTest, NonFiniteRowsGetNothingAndHarmNoNeighbour) {
  const RoutingPolicy policy({.num_experts = 3, .top_k = 2});
  const float inf = std::numeric_limits<float>::infinity();
  const Result r = Route(policy, {1, 2, 3, NAN, 2, 3, 1, inf, 3, 1, 2, -inf, 1, 2, 3});
  EXPECT_EQ(r.counts, (std::vector<int32_t>{2, 0, 0, 0, 2}));
  for (size_t i = 2; i < 8; ++i) EXPECT_EQ(r.ids[i], -1);
  EXPECT_EQ(r.ids[0], r.ids[8]);
  EXPECT_EQ(0, std::memcmp(&r.weights[0], &r.weights[8], 8));
}

TEST(RoutingPolicyTest, ExtremeLogits) {
  const RoutingPolicy policy({.num_experts = 3, .top_k = 3, .renormalize = true});
  const Result r = Route(policy, {3e38f, -3e38f, 0});
  EXPECT_EQ(r.ids, (std::vector<int32_t>{0, 1, 2}));  // the other two scores are both zero
  EXPECT_EQ(r.weights, (std::vector<float>{1, 0, 0}));
  const RoutingPolicy sigmoid(
      {.num_experts = 2, .top_k = 2, .score = RouterScore::kSigmoid, .renormalize = true});
  for (float w : Route(sigmoid, {-1e30f, -1e30f}).weights) EXPECT_EQ(w, 0.0f);
}

TEST(RoutingPolicyTest, MatchesReferenceOnRandomRows) {
  Random random(TestSeed());
  for (int round = 0; round < 400; ++round) {
    RoutingConfig config;
    config.num_experts = static_cast<int>(random.Int(1, 70));
    config.top_k = static_cast<int>(random.Int(1, std::min(8, config.num_experts)));
    config.score = random.Int(0, 1) == 0 ? RouterScore::kSoftmax : RouterScore::kSigmoid;
    config.softmax_after_topk = config.score == RouterScore::kSoftmax && random.Int(0, 1) == 0;
    config.renormalize = random.Int(0, 1) == 0;
    config.routed_scaling = random.Float(0.5f, 3.0f);
    RoutingProfile profile;
    for (int e = 0; e < config.num_experts && round % 2 == 0; ++e) {
      profile.allowed.push_back(random.Int(0, 3) != 0);
      profile.selection_bias.push_back(random.Float(-0.1f, 0.1f));
    }
    const RoutingPolicy policy(config, {profile});
    const int64_t tokens = random.Int(1, 9);
    std::vector<float> logits;
    for (int64_t i = 0; i < tokens * config.num_experts; ++i)
      logits.push_back(random.Float(-4.0f, 4.0f));
    const Result all = Route(policy, logits);
    for (int64_t t = 0; t < tokens; ++t) {
      const std::span<const float> row(logits.data() + t * config.num_experts,
                                       static_cast<size_t>(config.num_experts));
      const reference::Routed want = reference::Route(config, profile, row);
      const size_t begin = static_cast<size_t>(t * config.top_k);
      ASSERT_EQ(all.counts[static_cast<size_t>(t)], static_cast<int32_t>(want.ids.size()));
      for (size_t j = 0; j < want.ids.size(); ++j) {
        // float32 scores may tie where float64 ones do not: then the weights are equal all the
        // same.
        EXPECT_NEAR(static_cast<double>(all.weights[begin + j]), want.weights[j], 1e-6)
            << "round " << round;
      }
      const Result alone = Route(policy, {row.begin(), row.end()});
      EXPECT_EQ(0, std::memcmp(alone.ids.data(), &all.ids[begin], alone.ids.size() * 4));
      EXPECT_EQ(0,
                std::memcmp(alone.weights.data(), &all.weights[begin], alone.weights.size() * 4));
    }
  }
}

}  // namespace
}  // namespace switchyard::testing
