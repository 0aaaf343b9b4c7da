#include "worker/synth.h"

#include <filesystem>
#include <fstream>
#include <set>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "worker/bench_offline.h"
#include "worker/inspect.h"
#include "worker/model_config.h"
#include "worker/test_driver.h"

namespace switchyard {
namespace {

using nlohmann::json;
using testing::HasSubstr;

json TinyConfig(const std::string& architecture) {
  json config = {{"architectures", {architecture}},
                 {"vocab_size", 300},
                 {"hidden_size", 48},
                 {"intermediate_size", 72},
                 {"num_hidden_layers", 3},
                 {"num_attention_heads", 4},
                 {"num_key_value_heads", 2},
                 {"max_position_embeddings", 128},
                 {"num_experts_per_tok", 2},
                 {"num_experts", 6},
                 {"torch_dtype", "float32"}};
  if (architecture.starts_with("Qwen")) {
    config["moe_intermediate_size"] = 40;
    config["mlp_only_layers"] = {1};
  }
  if (architecture == "Qwen2MoeForCausalLM") config["shared_expert_intermediate_size"] = 56;
  return config;
}

class SynthTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = absl::StrCat(testing::TempDir(), "/synth_test_",
                        testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  SynthOptions OptionsFor(const json& config, const std::string& name) {
    const std::string path = absl::StrCat(dir_, "/", name, ".json");
    std::ofstream(path) << config.dump();
    SynthOptions options;
    options.config_path = path;
    options.out_dir = absl::StrCat(dir_, "/", name);
    return options;
  }
  static std::string Read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static TestOutput Generate(const std::string& model_dir, int expert_workers) {
    CellOptions options;
    options.model_dir = model_dir;
    options.expert_workers = expert_workers;
    options.threads = 2;
    options.max_num_batched_tokens = 64;
    options.kv_cache_memory = 4 << 20;
    const auto cell = LocalCell::Create(options);
    EXPECT_TRUE(cell.ok()) << cell.status();
    SamplingParams sampling;
    sampling.temperature = 0.0f;
    sampling.num_logprobs = 0;
    return TestDriver(cell->get()).Generate({72, 101, 108, 108, 111}, sampling, 20);
  }

  std::string dir_;
};

TEST_F(SynthTest, EveryFamilyLoadsAndGeneratesVariedFiniteText) {
  for (const char* architecture :
       {"Qwen3MoeForCausalLM", "OlmoeForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"}) {
    for (const char* dtype : {"float32", "bfloat16"}) {
      SynthOptions options =
          OptionsFor(TinyConfig(architecture), absl::StrCat(architecture, dtype));
      options.dtype = dtype;
      const absl::Status status = Synthesize(options);
      ASSERT_TRUE(status.ok()) << status;
      const TestOutput one = Generate(options.out_dir, 1);
      EXPECT_EQ(one.tokens.size(), 20u);
      EXPECT_TRUE(one.finite);
      EXPECT_GT(std::set<int32_t>(one.tokens.begin(), one.tokens.end()).size(), 3u) << architecture;
      EXPECT_EQ(Generate(options.out_dir, 3).tokens, one.tokens);
    }
  }
}

TEST_F(SynthTest, SameSeedSameBytesWhateverTheThreadsAndFiles) {
  SynthOptions options = OptionsFor(TinyConfig("MixtralForCausalLM"), "one");
  options.threads = 1;
  ASSERT_TRUE(Synthesize(options).ok());
  SynthOptions again = OptionsFor(TinyConfig("MixtralForCausalLM"), "two");
  again.threads = 3;
  ASSERT_TRUE(Synthesize(again).ok());
  EXPECT_EQ(Read(options.out_dir + "/model.safetensors"),
            Read(again.out_dir + "/model.safetensors"));
  SynthOptions other = OptionsFor(TinyConfig("MixtralForCausalLM"), "three");
  other.seed = 1;
  ASSERT_TRUE(Synthesize(other).ok());
  EXPECT_NE(Read(options.out_dir + "/model.safetensors"),
            Read(other.out_dir + "/model.safetensors"));

  SynthOptions sharded = OptionsFor(TinyConfig("MixtralForCausalLM"), "sharded");
  sharded.max_file_bytes = 100'000;
  int64_t done = 0, total = 0;
  sharded.progress = [&](int64_t d, int64_t t) { done = d, total = t; };
  ASSERT_TRUE(Synthesize(sharded).ok());
  EXPECT_EQ(done, total);
  EXPECT_TRUE(std::filesystem::exists(sharded.out_dir + "/model.safetensors.index.json"));
  EXPECT_EQ(Generate(sharded.out_dir, 2).tokens, Generate(options.out_dir, 2).tokens);
}

TEST_F(SynthTest, WrittenConfigNamesTypeAndEndTokens) {
  json config = TinyConfig("OlmoeForCausalLM");
  config["eos_token_id"] = 299;
  config["torch_dtype"] = "float16";
  const SynthOptions options = OptionsFor(config, "m");
  ASSERT_TRUE(Synthesize(options).ok());
  const auto written = LoadModelConfig(options.out_dir);
  ASSERT_TRUE(written.ok()) << written.status();
  EXPECT_EQ(written->stored_dtype, "float32");
  EXPECT_THAT(written->eos_token_ids, testing::ElementsAre(258, 256));
  const json tokenizer = json::parse(Read(options.out_dir + "/tokenizer.json"));
  EXPECT_EQ(tokenizer["model"]["vocab"].size(), 256u);
  EXPECT_EQ(tokenizer["model"]["vocab"]["A"], 65);
  EXPECT_EQ(tokenizer["model"]["vocab"]["\u0120"], 32);  // the space
}

TEST_F(SynthTest, ErrorsAreClear) {
  const auto error_of = [](const SynthOptions& options) {
    return std::string(Synthesize(options).message());
  };
  json small = TinyConfig("OlmoeForCausalLM");
  small["vocab_size"] = 258;
  EXPECT_THAT(error_of(OptionsFor(small, "small")),
              HasSubstr("vocab_size = 258 is less than the 259"));
  json bad = TinyConfig("OlmoeForCausalLM");
  bad["hidden_act"] = "gelu";
  EXPECT_THAT(error_of(OptionsFor(bad, "bad")), HasSubstr("hidden_act"));
  json huge = TinyConfig("MixtralForCausalLM");
  huge["head_dim"] = 64;
  huge["hidden_size"] = 1 << 18;
  huge["intermediate_size"] = 1 << 20;
  huge["num_local_experts"] = 64;
  EXPECT_THAT(error_of(OptionsFor(huge, "huge")), HasSubstr("but the disk has"));
  SynthOptions options = OptionsFor(TinyConfig("OlmoeForCausalLM"), "twice");
  ASSERT_TRUE(Synthesize(options).ok());
  EXPECT_THAT(error_of(options), HasSubstr("already holds a checkpoint"));
  options.config_path = dir_ + "/none.json";
  EXPECT_THAT(error_of(options), HasSubstr("cannot open"));
}

TEST_F(SynthTest, InspectCountsAndFindsWhatIsMissing) {
  const SynthOptions options = OptionsFor(TinyConfig("Qwen2MoeForCausalLM"), "m");
  ASSERT_TRUE(Synthesize(options).ok());
  const auto report = Inspect({.model_dir = options.out_dir});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->supported) << report->text;
  const json facts = json::parse(report->json);
  EXPECT_EQ(facts["num_moe_layers"], 2);
  // In panels of 16 outputs: 40 become 48.
  EXPECT_EQ(facts["expert_bytes"], (2 * 48 * 48 + 48 * 40) * 4);
  EXPECT_EQ(facts["parameters_total"].get<int64_t>() - facts["parameters_active"].get<int64_t>(),
            2 * 4 * 3 * 48 * 40);
  EXPECT_THAT(report->text, HasSubstr("shared expert of width 56"));

  std::filesystem::remove(options.out_dir + "/model.safetensors");
  const auto missing = Inspect({.model_dir = options.out_dir});
  ASSERT_TRUE(missing.ok());
  EXPECT_FALSE(missing->supported);
  EXPECT_THAT(missing->text, HasSubstr("model.safetensors"));
  EXPECT_FALSE(Inspect({.model_dir = dir_ + "/none"}).ok());
}

TEST_F(SynthTest, InspectDescribesRefusedConfigs) {
  for (const json& change :
       std::vector<json>{{{"hidden_act", "gelu"}},
                         {{"architectures", {"LlamaForCausalLM"}}},
                         {{"vocab_size", -1}},
                         {{"num_hidden_layers", 4096}, {"num_experts", 16384}},
                         {{"head_dim", 4096}, {"num_attention_heads", 16384}}}) {
    json config = TinyConfig("Qwen3MoeForCausalLM");
    config.update(change);
    std::ofstream(dir_ + "/config.json") << config.dump();
    const auto report = Inspect({.model_dir = dir_});
    ASSERT_TRUE(report.ok());
    EXPECT_FALSE(report->supported);
    EXPECT_THAT(report->text, HasSubstr("UNSUPPORTED"));
    EXPECT_FALSE(json::parse(report->json)["unsupported"].empty());
  }
}

TEST_F(SynthTest, BenchOfflineMeasures) {
  const SynthOptions synth = OptionsFor(TinyConfig("Qwen3MoeForCausalLM"), "m");
  ASSERT_TRUE(Synthesize(synth).ok());
  BenchOfflineOptions options;
  options.cell.model_dir = synth.out_dir;
  options.cell.attention_workers = 2;
  options.cell.max_num_batched_tokens = 32;
  options.prompt_tokens = 20;
  options.output_tokens = 4;
  options.batches = {1, 40};
  options.busy_threads = 1;
  const auto report = BenchOffline(options);
  ASSERT_TRUE(report.ok()) << report.status();
  const json rows = json::parse(report->Json())["rows"];
  ASSERT_EQ(rows.size(), 2u);
  for (const json& row : rows) {
    for (const char* field :
         {"prefill_tokens_per_second", "decode_tokens_per_second", "probe_gb_per_second",
          "decode_bytes_per_step", "decode_share_of_bound", "prefill_gflops", "busy_prefill_ratio",
          "busy_decode_ratio"}) {
      EXPECT_GT(row[field].get<double>(), 0.0) << field;
    }
  }
  EXPECT_EQ(rows[1]["batch"], 40);
  // One row reads the active parameters (padded to panels), forty read nearly all experts.
  const auto facts = json::parse(Inspect({.model_dir = synth.out_dir})->json);
  const double active = facts["parameters_active"].get<double>() * sizeof(float);
  const double total = facts["parameters_total"].get<double>() * sizeof(float);
  const double one = rows[0]["decode_bytes_per_step"].get<double>();
  const double forty = rows[1]["decode_bytes_per_step"].get<double>();
  EXPECT_GT(one, 0.6 * active);
  EXPECT_LT(one, 1.5 * active);
  EXPECT_GT(forty, one);
  EXPECT_LT(forty, 4 * total);  // two attention workers, two steps for forty rows
  EXPECT_THAT(report->Text(), HasSubstr("decode tok/s"));
  options.batches = {0};
  EXPECT_THAT(std::string(BenchOffline(options).status().message()), HasSubstr("batch 0"));
  options.batches = {1};
  options.prompt_tokens = 1000;
  EXPECT_THAT(std::string(BenchOffline(options).status().message()),
              HasSubstr("max_position_embeddings 128"));
}

}  // namespace
}  // namespace switchyard
