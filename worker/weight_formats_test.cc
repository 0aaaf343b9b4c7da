#include "worker/weight_formats.h"

#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/test_seed.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

ModelConfig Config() {
  ConfigReport report;
  ModelConfig config = ParseModelConfig(
      R"({"architectures":["Qwen2MoeForCausalLM"],"vocab_size":64,"hidden_size":32,
          "intermediate_size":48,"moe_intermediate_size":32,"shared_expert_intermediate_size":32,
          "num_hidden_layers":4,"num_attention_heads":2,"num_key_value_heads":1,
          "max_position_embeddings":64,"num_experts":8,"num_experts_per_tok":2,
          "mlp_only_layers":[0]})",
      &report);
  EXPECT_THAT(report.refusals, testing::IsEmpty());
  return config;
}

absl::StatusOr<WeightFormats> Parse(const std::string& quantization, const std::string& text) {
  return WeightFormats::Parse(quantization, text, "rules.json", Config(), DType::kBF16);
}

std::string Error(const std::string& text) {
  return std::string(Parse("int8", text).status().message());
}

const WeightFormat kPlain = FormatOf(DType::kBF16);

TEST(WeightFormatsTest, WithoutRules) {
  const auto none = Parse("none", "");
  ASSERT_TRUE(none.ok());
  EXPECT_EQ(none->name(), "");
  EXPECT_EQ(none->Of({TensorRole::kQuery, 1}), kPlain);
  const auto int4 = Parse("int4", "");
  EXPECT_EQ(int4->name(), "int4");
  EXPECT_EQ(int4->Of({TensorRole::kQuery, 1}), kInt4Weights);
  EXPECT_EQ(int4->Of({TensorRole::kExpertUp, 1, 7}), kInt4Weights);
  EXPECT_EQ(int4->Of({TensorRole::kSharedDown, 1}), kInt4Weights);
  EXPECT_EQ(int4->Of({TensorRole::kDenseGate, 0}), kInt4Weights);
  EXPECT_EQ(int4->Of({TensorRole::kLmHead}), kInt8Weights);
  for (const TensorRole role :
       {TensorRole::kEmbedding, TensorRole::kRouter, TensorRole::kSharedGate})
    EXPECT_EQ(int4->Of({role, 1}), kPlain);
  EXPECT_THAT(std::string(Parse("int2", "").status().message()), HasSubstr("\"int2\""));
}

TEST(WeightFormatsTest, TheLastRuleThatFitsWins) {
  const auto formats = Parse("int4", R"([
    {"roles": ["experts"], "format": "int8"},
    {"roles": ["experts"], "layers": [1, [3, 3]], "experts": [[0, 2], 7], "format": "none"},
    {"roles": ["k_proj", "lm_head"], "format": "none"}])");
  ASSERT_TRUE(formats.ok()) << formats.status();
  EXPECT_EQ(formats->Of({TensorRole::kExpertGate, 2, 0}), kInt8Weights);
  EXPECT_EQ(formats->Of({TensorRole::kExpertGate, 1, 2}), kPlain);
  EXPECT_EQ(formats->Of({TensorRole::kExpertGate, 3, 7}), kPlain);
  EXPECT_EQ(formats->Of({TensorRole::kExpertGate, 3, 3}), kInt8Weights);
  EXPECT_EQ(formats->Of({TensorRole::kKey, 3}), kPlain);
  EXPECT_EQ(formats->Of({TensorRole::kQuery, 3}), kInt4Weights);
  EXPECT_EQ(formats->Of({TensorRole::kLmHead}), kPlain);
  EXPECT_EQ(formats->OfExperts(Config(), 2), kInt8Weights);
  EXPECT_EQ(formats->OfExperts(Config(), 1), std::nullopt);
  // The name tells rules apart, so that workers with other ones are refused.
  EXPECT_THAT(formats->name(), testing::StartsWith("int4+"));
  EXPECT_NE(formats->name(),
            Parse("int4", R"([{"roles": ["experts"], "format": "int8"}])")->name());
}

TEST(WeightFormatsTest, BadFilesAreRefusedWithLineAndReason) {
  EXPECT_THAT(Error("[\n{\"roles\":\n}]"), HasSubstr("rules.json, line 3: not JSON"));
  EXPECT_THAT(Error("{}"), HasSubstr("line 1: not a list of rules"));
  EXPECT_THAT(Error("[\n\n7]"), HasSubstr("rule 1 is not an object"));
  const std::string good = "[\n{\"roles\": [\"dense\"], \"format\": \"none\"},\n\n";
  const auto second = [&](const std::string& rule) { return Error(good + rule + "]"); };
  EXPECT_THAT(second(R"({"roles": ["experts"], "format": "int3"})"),
              HasSubstr("rules.json, line 4: format is \"int3\", not none, int8 or int4"));
  EXPECT_THAT(second(R"({"roles": ["router"], "format": "int8"})"),
              HasSubstr("line 4: roles has \"router\", not one of attention"));
  EXPECT_THAT(second(R"({"format": "int8"})"), HasSubstr("roles is missing"));
  EXPECT_THAT(second(R"({"roles": ["dense"], "layers": [4], "format": "int8"})"),
              HasSubstr("layers has 4, not a number or a pair below 4"));
  EXPECT_THAT(second(R"({"roles": ["experts"], "experts": [[3, 1]], "format": "int8"})"),
              HasSubstr("experts has [3,1]"));
  EXPECT_THAT(second(R"({"roles": ["dense"], "experts": [1], "format": "int8"})"),
              HasSubstr("experts stands beside a role that is not experts"));
  EXPECT_THAT(second(R"({"roles": ["lm_head"], "layers": [1], "format": "int8"})"),
              HasSubstr("lm_head"));
  EXPECT_THAT(second(R"({"roles": ["dense"], "format": "int8", "bits": 3})"),
              HasSubstr("field \"bits\" is not known"));
}

TEST(WeightFormatsTest, MutationsNeverCrash) {
  std::mt19937 random(TestSeed());
  const std::string good =
      R"([{"roles": ["experts"], "layers": [1, [2, 3]], "experts": [0], "format": "int8"}])";
  for (int round = 0; round < 20000; ++round) {
    std::string text = good;
    for (uint32_t edits = 1 + random() % 3; edits > 0; --edits)
      text[random() % text.size()] = "0123456789\"{}[],:-aeg\\\n"[random() % 23];
    (void)Parse("int4", text);
  }
}

}  // namespace
}  // namespace switchyard
