#include "worker/checkpoint.h"

#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace switchyard {
namespace {

using nlohmann::json;
using testing::HasSubstr;

std::string Fixture(const std::string& name) {
  return absl::StrCat(SWITCHYARD_SOURCE_DIR, "/tests/fixtures/", name);
}

// One tensor of a test file: shape and float32 values.
struct Content {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

void WriteFile(const std::string& path, const std::map<std::string, Content>& tensors) {
  json header;
  std::string data;
  for (const auto& [name, content] : tensors) {
    const size_t begin = data.size();
    data.append(reinterpret_cast<const char*>(content.values.data()),
                content.values.size() * sizeof(float));
    header[name] = {
        {"dtype", "F32"}, {"shape", content.shape}, {"data_offsets", {begin, data.size()}}};
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), 8);
  file << text << data;
}

ModelConfig TinyConfig() {
  ConfigReport report;
  ModelConfig config = ParseModelConfig(
      R"({"architectures":["OlmoeForCausalLM"],"vocab_size":6,"hidden_size":4,"intermediate_size":3,
          "num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"max_position_embeddings":16,
          "num_experts":2,"num_experts_per_tok":1})",
      &report);
  EXPECT_THAT(report.refusals, testing::IsEmpty());
  return config;
}

// Values that say where they are from: tensor number * 1000 + index.
std::map<std::string, Content> TinyTensors(const ModelConfig& config) {
  std::map<std::string, Content> tensors;
  float base = 0;
  for (const TensorSpec& spec : ModelTensors(config)) {
    Content content{spec.shape, {}};
    for (int64_t i = 0; i < spec.numel(); ++i)
      content.values.push_back(base + static_cast<float>(i));
    base += 1000;
    tensors[spec.name] = content;
  }
  return tensors;
}

class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = absl::StrCat(testing::TempDir(), "/checkpoint_test_",
                        testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string OpenError(const std::map<std::string, Content>& tensors) {
    WriteFile(dir_ + "/model.safetensors", tensors);
    return std::string(Checkpoint::Open(dir_, TinyConfig()).status().message());
  }

  std::string dir_;
};

TEST(CheckpointFixtureTest, EveryFixtureOpens) {
  for (const char* name :
       {"qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe_tied_bf16", "rope_linear"}) {
    const auto config = LoadModelConfig(Fixture(name));
    ASSERT_TRUE(config.ok()) << config.status();
    const auto checkpoint = Checkpoint::Open(Fixture(name), *config);
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  }
}

TEST_F(CheckpointTest, LoadsConvertsAndReleases) {
  const ModelConfig config = TinyConfig();
  WriteFile(dir_ + "/model.safetensors", TinyTensors(config));
  const auto checkpoint = Checkpoint::Open(dir_, config);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const TensorKey key{TensorRole::kExpertUp, 0, 1};
  Checkpoint::Loaded f32 = checkpoint->Load(key, DType::kF32);
  const Checkpoint::Loaded half = checkpoint->Load(key, DType::kBF16);
  EXPECT_EQ(f32.view.dim(0), 3);
  EXPECT_EQ(f32.view.dim(1), 4);
  for (int i = 0; i < 12; ++i) {
    EXPECT_EQ(half.view.as<bf16>()[i].bits, ToBF16(f32.view.as<float>()[i]).bits);
  }
  f32.Release();
  EXPECT_EQ(checkpoint->Load({TensorRole::kEmbedding}, DType::kF32).view.as<float>()[5], 5.0f);
}

TEST_F(CheckpointTest, MissingWrongAndLeftOverTensorsAreNamed) {
  const auto good = TinyTensors(TinyConfig());
  EXPECT_EQ(OpenError(good), "");
  auto tensors = good;
  tensors.erase("model.layers.0.mlp.experts.1.up_proj.weight");
  EXPECT_THAT(OpenError(tensors),
              HasSubstr("missing tensors: model.layers.0.mlp.experts.1.up_proj.weight"));
  tensors = good;
  tensors["model.layers.0.mlp.extra.weight"] = {{1}, {0.0f}};
  EXPECT_THAT(OpenError(tensors), HasSubstr("does not explain: model.layers.0.mlp.extra.weight"));
  tensors = good;
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = {{1}, {0.0f}};
  EXPECT_EQ(OpenError(tensors), "");
  tensors = good;
  tensors["model.norm.weight"].shape = {2, 2};
  EXPECT_THAT(OpenError(tensors), HasSubstr("has shape [2, 2] but the config needs [4]"));
}

TEST_F(CheckpointTest, FusedExpertsAreSliced) {
  const ModelConfig config = TinyConfig();
  const auto separate = TinyTensors(config);
  auto fused = separate;
  Content gate_up{{2, 6, 4}, {}};
  Content down{{2, 4, 3}, {}};
  for (int e = 0; e < 2; ++e) {
    const std::string prefix = absl::StrCat("model.layers.0.mlp.experts.", e, ".");
    for (const char* part : {"gate_proj", "up_proj", "down_proj"}) {
      const std::string name = absl::StrCat(prefix, part, ".weight");
      auto& target = std::string(part) == "down_proj" ? down : gate_up;
      target.values.insert(target.values.end(), fused[name].values.begin(),
                           fused[name].values.end());
      fused.erase(name);
    }
  }
  fused["model.layers.0.mlp.experts.gate_up_proj"] = gate_up;
  fused["model.layers.0.mlp.experts.down_proj"] = down;
  WriteFile(dir_ + "/model.safetensors", fused);
  const auto checkpoint = Checkpoint::Open(dir_, config);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  for (const TensorSpec& spec : ModelTensors(config)) {
    const Checkpoint::Loaded loaded = checkpoint->Load(spec.key, DType::kF32);
    const std::vector<float>& expected = separate.at(spec.name).values;
    EXPECT_EQ(std::memcmp(loaded.view.data, expected.data(), expected.size() * sizeof(float)), 0)
        << spec.name;
  }
}

TEST_F(CheckpointTest, BadIndexFilesAreRefused) {
  const auto open = [&](const std::string& index) {
    std::ofstream(dir_ + "/model.safetensors.index.json") << index;
    return std::string(Checkpoint::Open(dir_, TinyConfig()).status().message());
  };
  EXPECT_THAT(open("{"), HasSubstr("weight_map"));
  EXPECT_THAT(open(R"({"weight_map":{"a":"../../etc/passwd"}})"), HasSubstr("bad file name"));
  EXPECT_THAT(open(R"({"weight_map":{"a":7}})"), HasSubstr("bad file name"));
  EXPECT_THAT(open(R"({"weight_map":{"a":"gone.safetensors"}})"), HasSubstr("cannot open"));
  WriteFile(dir_ + "/one.safetensors", {{"b", {{1}, {0.0f}}}});
  EXPECT_THAT(open(R"({"weight_map":{"a":"one.safetensors"}})"), HasSubstr("does not hold it"));
  std::filesystem::remove(dir_ + "/model.safetensors.index.json");
  EXPECT_THAT(std::string(Checkpoint::Open(dir_, TinyConfig()).status().message()),
              HasSubstr("model.safetensors"));
}

}  // namespace
}  // namespace switchyard
