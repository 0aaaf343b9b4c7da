#include "worker/model_config.h"

#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/test_seed.h"
#include "nlohmann/json.hpp"
#include "worker/model_families.h"
#include "worker/model_tensors.h"
#include "worker/rope.h"

namespace switchyard {
namespace {

using nlohmann::json;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

json BaseConfig(const std::string& architecture) {
  json config = {{"architectures", {architecture}},
                 {"vocab_size", 100},
                 {"hidden_size", 48},
                 {"intermediate_size", 72},
                 {"num_hidden_layers", 4},
                 {"num_attention_heads", 4},
                 {"num_key_value_heads", 2},
                 {"max_position_embeddings", 256},
                 {"num_experts_per_tok", 2},
                 {"num_experts", 8},
                 {"moe_intermediate_size", 56}};
  if (architecture == "Qwen2MoeForCausalLM") config["shared_expert_intermediate_size"] = 40;
  return config;
}

struct Parsed {
  ModelConfig config;
  ConfigReport report;
};

Parsed Parse(const json& config) {
  Parsed out;
  out.config = ParseModelConfig(config.dump(), &out.report);
  return out;
}

// The one refusal of `config`, or all of them joined.
std::string RefusalOf(const json& config) {
  return absl::StrJoin(Parse(config).report.refusals, "; ");
}

TEST(ModelConfigTest, EveryFamilyParses) {
  for (const ModelFamily& family : ModelFamilies()) {
    const Parsed parsed = Parse(BaseConfig(std::string(family.architecture)));
    EXPECT_THAT(parsed.report.refusals, IsEmpty()) << family.architecture;
    EXPECT_THAT(parsed.report.notes.size(),
                family.expert_width_field == "intermediate_size" ? 1u : 0u);
    EXPECT_EQ(parsed.config.attention.qk_norm, family.qk_norm);
    EXPECT_EQ(parsed.config.moe.expert_width,
              family.expert_width_field == "intermediate_size" ? 72 : 56);
    EXPECT_EQ(parsed.config.num_moe_layers(), 4);
  }
}

TEST(ModelConfigTest, FamilyFacts) {
  const ModelConfig qwen2 = Parse(BaseConfig("Qwen2MoeForCausalLM")).config;
  EXPECT_TRUE(qwen2.attention.qkv_bias);
  EXPECT_FALSE(qwen2.attention.output_bias);
  EXPECT_EQ(qwen2.moe.shared_width, 40);
  const ModelConfig mixtral = Parse(BaseConfig("MixtralForCausalLM")).config;
  EXPECT_EQ(mixtral.attention.rope.theta, 1e6);
  EXPECT_TRUE(mixtral.moe.routing.softmax_after_topk);
  EXPECT_EQ(mixtral.names.block, "block_sparse_moe");
  json biased = BaseConfig("Qwen3MoeForCausalLM");
  biased["attention_bias"] = true;
  EXPECT_TRUE(Parse(biased).config.attention.qkv_bias);
  EXPECT_TRUE(Parse(biased).config.attention.output_bias);
}

TEST(ModelConfigTest, DenseLayersBySparseStepAndList) {
  json config = BaseConfig("Qwen3MoeForCausalLM");
  config["decoder_sparse_step"] = 2;
  config["mlp_only_layers"] = {3};
  const Parsed parsed = Parse(config);
  EXPECT_THAT(parsed.config.is_moe_layer, ElementsAre(0, 1, 0, 0));
  EXPECT_EQ(parsed.config.dense_width, 72);
}

TEST(ModelConfigTest, BothSpellingsOfRopeAndDType) {
  json older = BaseConfig("Qwen3MoeForCausalLM");
  older["torch_dtype"] = "bfloat16";
  older["rope_theta"] = 5000.0;
  older["rope_scaling"] = {{"type", "linear"}, {"factor", 4.0}};
  json newer = BaseConfig("Qwen3MoeForCausalLM");
  newer["dtype"] = "bfloat16";
  newer["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 4.0}, {"rope_theta", 5000.0}};
  for (const json& config : {older, newer}) {
    const Parsed parsed = Parse(config);
    EXPECT_THAT(parsed.report.refusals, IsEmpty());
    EXPECT_EQ(parsed.config.dtype, DType::kBF16);
    EXPECT_EQ(parsed.config.attention.rope.type, RopeType::kLinear);
    EXPECT_EQ(parsed.config.attention.rope.theta, 5000.0);
    EXPECT_EQ(parsed.config.attention.rope.factor, 4.0);
  }
}

TEST(ModelConfigTest, PartialRotaryFactor) {
  json config = BaseConfig("MixtralForCausalLM");
  config["head_dim"] = 16;
  config["partial_rotary_factor"] = 0.5;
  EXPECT_EQ(Parse(config).config.attention.rope.rotary_dim, 8);
  config["head_dim"] = 6;
  EXPECT_THAT(RefusalOf(config), HasSubstr("rotary dimension of 3"));
}

TEST(ModelConfigTest, KnownFieldsThatChangeTheMathsAreRefusedByName) {
  const std::vector<std::pair<json, std::string>> cases = {
      {{{"hidden_act", "gelu"}}, "hidden_act = \"gelu\""},
      {{{"quantization_config", {{"bits", 4}}}},
       "quantization_config.quant_method = \"\" is not implemented"},
      {{{"use_sliding_window", true}, {"sliding_window", 64}}, "sliding_window = 64"},
      {{{"layer_types", {"full_attention", "sliding_attention"}}}, "layer_types"},
      {{{"rope_scaling", {{"rope_type", "longrope"}, {"factor", 2.0}}}},
       "rope_type = \"longrope\""},
      {{{"rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}}}, "nested"},
      {{{"rope_scaling", {{"rope_type", "default"}, {"mrope_section", {8, 8}}}}}, "mrope_section"},
      {{{"attn_logit_softcapping", 50.0}}, "attn_logit_softcapping = 50.0"},
      {{{"scoring_func", "sigmoid"}}, "scoring_func = \"sigmoid\""},
      {{{"shared_expert_intermediate_size", 32}}, "shared_expert_intermediate_size = 32"},
      {{{"dtype", "float8_e4m3fn"}}, "dtype = \"float8_e4m3fn\""},
      {{{"architectures", {"LlamaForCausalLM"}}}, "\"LlamaForCausalLM\" is not supported"},
  };
  for (const auto& [changes, expected] : cases) {
    json config = BaseConfig("Qwen3MoeForCausalLM");
    config.update(changes);
    EXPECT_THAT(RefusalOf(config), HasSubstr(expected));
  }
}

TEST(ModelConfigTest, HarmlessValuesPass) {
  for (const json& changes : std::vector<json>{
           {{"use_sliding_window", false}, {"sliding_window", 64}},
           {{"use_sliding_window", true}, {"sliding_window", 256}},
           {{"sliding_window", nullptr}},
           {{"quantization_config", nullptr}},
           {{"routed_scaling_factor", 1.0}},
           {{"layer_types",
             {"full_attention", "full_attention", "full_attention", "full_attention"}}},
           {{"rope_scaling", nullptr}, {"rope_theta", 1000000}},
           {{"rope_scaling", json::object()}, {"rope_theta", 1000000}},
           {{"num_experts", nullptr}, {"num_local_experts", 8}},
       }) {
    json config = BaseConfig("Qwen3MoeForCausalLM");
    config.update(changes);
    EXPECT_EQ(RefusalOf(config), "") << changes;
  }
}

TEST(ModelConfigTest, HostileNumbersNameFieldAndValue) {
  const std::vector<std::pair<std::string, json>> cases = {
      {"vocab_size", -1},
      {"vocab_size", 0},
      {"hidden_size", 1e300},
      {"hidden_size", 18446744073709551615ull},
      {"num_hidden_layers", "12"},
      {"num_hidden_layers", 1000000000},
      {"num_attention_heads", 0},
      {"num_key_value_heads", 3},
      {"num_experts", -5},
      {"num_experts_per_tok", 9},
      {"max_position_embeddings", json::array()},
      {"rms_norm_eps", -1.0},
      {"rope_theta", 0.0},
      {"head_dim", 1 << 30},
      {"moe_intermediate_size", 2.5},
      {"head_dim", 7},
      {"tie_word_embeddings", 1},
      {"decoder_sparse_step", 0},
      {"mlp_only_layers", "all"},
  };
  for (const auto& [field, value] : cases) {
    json config = BaseConfig("Qwen3MoeForCausalLM");
    config[field] = value;
    const std::string refusal = RefusalOf(config);
    EXPECT_THAT(refusal, testing::AnyOf(HasSubstr(field), HasSubstr("num_attention_heads")))
        << value;
    EXPECT_THAT(refusal, HasSubstr(value.dump().substr(0, 40))) << field;
  }
}

TEST(ModelConfigTest, SizesThatMultiplyToNonsenseAreRefused) {
  json config = BaseConfig("Qwen3MoeForCausalLM");
  config["num_hidden_layers"] = 4096;
  config["num_experts"] = 16384;
  EXPECT_THAT(RefusalOf(config), HasSubstr("67108864 exceeds"));
}

TEST(ModelConfigTest, MissingFieldsAreNamed) {
  for (const char* field :
       {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "num_experts_per_tok", "moe_intermediate_size"}) {
    json config = BaseConfig("Qwen3MoeForCausalLM");
    config.erase(field);
    EXPECT_THAT(RefusalOf(config), HasSubstr(absl::StrCat(field, " is missing")));
  }
  for (const char* text : {"", "[]", "{", "null", "{\"a\":"}) {
    ConfigReport report;
    ParseModelConfig(text, &report);
    EXPECT_THAT(report.refusals, ElementsAre(HasSubstr("not a JSON object"))) << text;
  }
}

TEST(ModelConfigTest, UnknownFieldsAndForeignIdsAreNoted) {
  json config = BaseConfig("Qwen3MoeForCausalLM");
  config["flux_capacitor"] = 88;
  config["eos_token_id"] = {5, 100, 7, 5};
  config["bos_token_id"] = 100;
  const Parsed parsed = Parse(config);
  EXPECT_THAT(parsed.report.refusals, IsEmpty());
  EXPECT_THAT(parsed.report.notes, Contains(HasSubstr("flux_capacitor")));
  EXPECT_THAT(parsed.report.notes, Contains(HasSubstr("eos_token_id 100")));
  EXPECT_THAT(parsed.report.notes, Contains(HasSubstr("bos_token_id 100")));
  EXPECT_THAT(parsed.config.eos_token_ids, ElementsAre(5, 7));
}

TEST(ModelConfigTest, GenerationConfigReplacesEos) {
  json config = BaseConfig("Qwen3MoeForCausalLM");
  config["eos_token_id"] = 5;
  Parsed parsed = Parse(config);
  ApplyGenerationConfig(R"({"eos_token_id": [8, 9]})", &parsed.config, &parsed.report);
  EXPECT_THAT(parsed.config.eos_token_ids, ElementsAre(8, 9));
  ApplyGenerationConfig(R"({"temperature": 0.7})", &parsed.config, &parsed.report);
  EXPECT_THAT(parsed.config.eos_token_ids, ElementsAre(8, 9));
  ApplyGenerationConfig(R"({"eos_token_id": 3})", &parsed.config, &parsed.report);
  EXPECT_THAT(parsed.config.eos_token_ids, ElementsAre(3));
  EXPECT_THAT(parsed.report.refusals, IsEmpty());
}

TEST(ModelConfigTest, AGenerationConfigWithoutUsableIdsChangesNothing) {
  json config = BaseConfig("Qwen3MoeForCausalLM");
  config["eos_token_id"] = 5;
  Parsed parsed = Parse(config);
  for (const char* text : {R"({"eos_token_id": []})", R"({"eos_token_id": [100000]})"}) {
    ApplyGenerationConfig(text, &parsed.config, &parsed.report);
    EXPECT_THAT(parsed.config.eos_token_ids, ElementsAre(5)) << text;
  }
}

TEST(ModelConfigTest, DeepNestingIsRefusedBeforeItIsRead) {
  const std::string dir = testing::TempDir() + "/deep_config";
  std::filesystem::create_directories(dir);
  json config = BaseConfig("Qwen3MoeForCausalLM");
  config["note"] = R"(brackets in strings [[[ "{{{ \ do not count)";
  for (const bool deep : {false, true}) {
    std::string text = config.dump();
    if (deep) {
      text.pop_back();
      text += R"(,"x":)" + std::string(1'000'000, '[') + std::string(1'000'000, ']') + "}";
    }
    std::ofstream(dir + "/config.json") << text;
    const auto loaded = LoadModelConfig(dir);
    EXPECT_EQ(loaded.ok(), !deep) << loaded.status();
    if (deep) {
      EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("1000001 levels"));
    }
  }
}

TEST(ModelConfigTest, MutatedConfigsNeverCrash) {
  std::mt19937 random(TestSeed());
  json base = BaseConfig("Qwen2MoeForCausalLM");
  base["rope_scaling"] = {
      {"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 64}};
  const std::string text = base.dump();
  const std::string alphabet = "0123456789-.eE\"{}[]:,tfn\x80\xff";
  for (int round = 0; round < 20000; ++round) {
    std::string mutated = text;
    const int edits = 1 + static_cast<int>(random() % 4);
    for (int i = 0; i < edits && !mutated.empty(); ++i) {
      const size_t at = random() % mutated.size();
      if (random() % 3 == 0) {
        mutated.erase(at, 1 + random() % 8);
      } else {
        mutated[at] = alphabet[random() % alphabet.size()];
      }
    }
    ConfigReport report;
    const ModelConfig config = ParseModelConfig(mutated, &report);
    if (report.refusals.empty()) {
      EXPECT_GE(CountParameters(config).total, CountParameters(config).active);
      MakeRopeTables(config.attention.rope, 2);
    }
  }
}

TEST(ModelTensorsTest, CountsAgreeWithTheList) {
  for (const ModelFamily& family : ModelFamilies()) {
    json json_config = BaseConfig(std::string(family.architecture));
    if (family.has_dense_layers) json_config["decoder_sparse_step"] = 2;
    const ModelConfig config = Parse(json_config).config;
    int64_t total = 0;
    for (const TensorSpec& spec : ModelTensors(config)) total += spec.numel();
    EXPECT_EQ(CountParameters(config).total, total) << family.architecture;
  }
}

}  // namespace
}  // namespace switchyard
