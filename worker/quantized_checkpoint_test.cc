// Checkpoints that come quantised: each loads to exactly the weights that their generator computed
// from the codes before it packed them (tests/fixtures/make_quantized.py), to the same tokens as
// those weights stored as floats, and near the model that was quantised. What is not supported is
// refused by name; damaged files end in a message.
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/test_seed.h"
#include "nlohmann/json.hpp"
#include "worker/checkpoint.h"
#include "worker/local_cell.h"
#include "worker/model_facts.h"
#include "worker/test_cases.h"
#include "worker/test_driver.h"

namespace switchyard {
namespace {

using nlohmann::json;
using testing::HasSubstr;

std::vector<std::string> Formats() {
  return {"fp8_block", "fp8_tensor",   "fp8_channel", "int8_channel",
          "mxfp4",     "mxfp4_packed", "gptq4",       "gptq4_act_order",
          "gptq8_v2",  "awq",          "packed_int4", "packed_int8"};
}

std::string Folder(const std::string& name) {
  return absl::StrCat(SWITCHYARD_SOURCE_DIR, "/tests/fixtures/quantized/", name);
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

void WriteFile(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

std::string Fnv1a(const Tensor& tensor) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto* bytes = static_cast<const uint8_t*>(tensor.data);
  for (size_t i = 0; i < tensor.bytes(); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  return absl::StrFormat("%016x", hash);
}

// A folder of a test's own.
class QuantizedCheckpointTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    std::string name = testing::UnitTest::GetInstance()->current_test_info()->name();
    dir_ = absl::StrCat(testing::TempDir(), "/quantized_", absl::StrReplaceAll(name, {{"/", "_"}}));
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  // Opens a copy of a fixture whose config's quantization_config is changed by `edit`.
  std::string ConfigError(const std::string& fixture, const std::function<void(json&)>& edit) {
    json config = json::parse(ReadFile(Folder(fixture) + "/config.json"));
    edit(config["quantization_config"]);
    WriteFile(dir_ + "/config.json", config.dump());
    WriteFile(dir_ + "/model.safetensors", ReadFile(Folder(fixture) + "/model.safetensors"));
    return OpenError();
  }
  // The same with a changed file; `edit` gets header and data.
  std::string FileError(const std::string& fixture,
                        const std::function<void(json&, std::string&)>& edit) {
    const std::string file = ReadFile(Folder(fixture) + "/model.safetensors");
    uint64_t length;
    std::memcpy(&length, file.data(), 8);
    json header = json::parse(file.substr(8, length));
    std::string data = file.substr(8 + length);
    edit(header, data);
    const std::string text = header.dump();
    length = text.size();
    WriteFile(dir_ + "/config.json", ReadFile(Folder(fixture) + "/config.json"));
    WriteFile(dir_ + "/model.safetensors",
              std::string(reinterpret_cast<const char*>(&length), 8) + text + data);
    return OpenError();
  }
  std::string OpenError() const {
    return std::string(OpenModel({.model_dir = dir_}).status().message());
  }

  std::string dir_;
};

// Log-softmax of every position of a fixed prompt, by token id.
std::vector<std::vector<float>> Logprobs(const std::string& dir) {
  CellOptions options;
  options.model_dir = dir;
  options.dtype = "float32";
  options.threads = 2;
  options.expert_workers = 2;
  options.kv_cache_memory = 8 << 20;
  options.max_num_batched_tokens = 64;
  absl::StatusOr<std::unique_ptr<LocalCell>> cell = LocalCell::Create(options);
  EXPECT_TRUE(cell.ok()) << cell.status();
  TestDriver driver(cell->get());
  std::mt19937 random(1);
  SamplingParams sampling;
  sampling.num_prompt_logprobs = (*cell)->model_info().vocab_size;
  const TestOutput output =
      driver.Generate(RandomTokens(48, (*cell)->model_info().vocab_size, random), sampling, 1, 64);
  std::vector<std::vector<float>> rows;
  for (const TokenLogprob& row : output.prompt_logprobs) {
    std::vector<float>& by_token = rows.emplace_back(row.top.size());
    for (const auto& [token, logprob] : row.top) by_token[static_cast<size_t>(token)] = logprob;
  }
  return rows;
}

TEST_P(QuantizedCheckpointTest, LoadsToTheDequantisedReference) {
  const json reference = json::parse(ReadFile(Folder(GetParam()) + "/reference.json"));
  const absl::StatusOr<OpenedModel> model = OpenModel({.model_dir = Folder(GetParam())});
  ASSERT_TRUE(model.ok()) << model.status();
  int64_t quantized = 0;
  for (const TensorSpec& spec : ModelTensors(model->config)) {
    const json& want = reference["tensors"][spec.name];
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      Checkpoint::Loaded loaded = model->checkpoint.Load(spec.key, dtype);
      EXPECT_EQ(Fnv1a(loaded.view), want[DTypeName(dtype)].get<std::string>())
          << spec.name << " " << DTypeName(dtype);
      loaded.Release();
    }
    if (model->checkpoint.Quantized(spec.key) != nullptr) ++quantized;
  }
  EXPECT_EQ(quantized, GetParam() == "mxfp4" ? 12 : 26);
  EXPECT_EQ(quantized, model->checkpoint.num_quantized());
}

// The worst difference of a logit from the float model's, over the largest.
double Bound(const std::string& format) {
  if (format.starts_with("fp8")) return 0.25;  // 3 bits of mantissa; a router may choose otherwise
  return format.find('8') != std::string::npos ? 0.02 : 0.4;
}

TEST_P(QuantizedCheckpointTest, LogitsAreThoseOfTheDequantisedWeightsAndNearTheSource) {
  const absl::StatusOr<OpenedModel> model = OpenModel({.model_dir = Folder(GetParam())});
  ASSERT_TRUE(model.ok()) << model.status();
  json header;
  std::string data;
  for (const TensorSpec& spec : ModelTensors(model->config)) {
    const Checkpoint::Loaded loaded = model->checkpoint.Load(spec.key, DType::kF32);
    const size_t begin = data.size();
    data.append(static_cast<const char*>(loaded.view.data), loaded.view.bytes());
    header[spec.name] = {
        {"dtype", "F32"}, {"shape", spec.shape}, {"data_offsets", {begin, data.size()}}};
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  WriteFile(dir_ + "/model.safetensors",
            std::string(reinterpret_cast<const char*>(&length), 8) + text + data);
  WriteFile(dir_ + "/config.json", ReadFile(Folder("source") + "/config.json"));

  const std::vector<std::vector<float>> got = Logprobs(Folder(GetParam()));
  EXPECT_EQ(got, Logprobs(dir_));
  const std::vector<std::vector<float>> source = Logprobs(Folder("source"));
  double worst = 0, largest = 0;
  ASSERT_EQ(got.size(), source.size());
  for (size_t row = 0; row < got.size(); ++row) {
    for (size_t token = 0; token < got[row].size(); ++token) {
      worst = std::max(worst, std::abs(double{got[row][token]} - source[row][token]));
      largest = std::max(largest, std::abs(double{source[row][token]}));
    }
  }
  EXPECT_LE(worst, Bound(GetParam()) * largest);
  std::cout << GetParam() << ": largest difference of a logprob " << worst / largest
            << " of the largest\n";
}

INSTANTIATE_TEST_SUITE_P(Formats, QuantizedCheckpointTest, testing::ValuesIn(Formats()),
                         [](const auto& info) { return info.param; });

using QuantizedRefusalTest = QuantizedCheckpointTest;

TEST_F(QuantizedRefusalTest, UnsupportedConfigsAreNamed) {
  const auto error = [&](const std::string& fixture, const std::string& patch) {
    return ConfigError(fixture, [&](json& config) { config.merge_patch(json::parse(patch)); });
  };
  EXPECT_EQ(error("gptq4", "{}"), "");
  EXPECT_THAT(error("gptq4", R"({"quant_method":"bitsandbytes"})"),
              HasSubstr("quantization_config.quant_method = \"bitsandbytes\" is not implemented"));
  for (int bits : {2, 3}) {
    EXPECT_THAT(
        error("gptq4", absl::StrCat(R"({"bits":)", bits, "}")),
        HasSubstr(absl::StrCat("quantization_config.bits = ", bits, " is not implemented")));
  }
  EXPECT_THAT(error("gptq4", R"({"checkpoint_format":"marlin"})"), HasSubstr("checkpoint_format"));
  EXPECT_THAT(error("gptq4", R"({"group_size":0})"), HasSubstr("group_size = 0"));
  EXPECT_THAT(error("gptq4", R"({"dynamic":{"+:.*down_proj":{"bits":8}}})"), HasSubstr("dynamic"));
  EXPECT_EQ(error("gptq4", R"({"dynamic":{"-:.*gate$":{}}})"), "");
  EXPECT_THAT(error("awq", R"({"version":"gemv"})"), HasSubstr("version = \"gemv\""));
  EXPECT_THAT(error("awq", R"({"bits":3})"), HasSubstr("bits = 3"));
  EXPECT_THAT(error("fp8_block", R"({"fmt":"e5m2"})"), HasSubstr("fmt = \"e5m2\""));
  EXPECT_THAT(error("fp8_block", R"({"weight_block_size":[128]})"),
              HasSubstr("weight_block_size = [128] is not two block sizes"));
  EXPECT_THAT(error("packed_int4", R"({"sparsity_config":{"format":"sparse-24-bitmask"}})"),
              HasSubstr("sparsity_config"));
  EXPECT_THAT(error("packed_int4", R"({"transform_config":{"config_groups":{"a":1}}})"),
              HasSubstr("transform_config"));
  EXPECT_THAT(error("packed_int4", R"({"config_groups":7})"), HasSubstr("config_groups"));
  EXPECT_THAT(error("packed_int4", R"({"config_groups":{"group_0":{"weights":{"num_bits":3}}}})"),
              HasSubstr("weights.num_bits = 3"));
  EXPECT_THAT(error("packed_int4", R"({"format":"nvfp4-pack-quantized"})"),
              HasSubstr("nvfp4-pack-quantized"));
}

TEST_F(QuantizedRefusalTest, TensorsThatDoNotFitAreNamed) {
  const std::string q = "model.layers.0.self_attn.q_proj.";
  const auto reshape = [&](const std::string& fixture, const std::string& name, const json& shape) {
    return FileError(fixture, [&](json& header, std::string&) { header[name]["shape"] = shape; });
  };
  EXPECT_THAT(reshape("gptq4", q + "qweight", {64, 8}),
              HasSubstr(q + "qweight is I32 [64, 8] but the config needs I32 [8, 64]"));
  EXPECT_THAT(reshape("gptq4", q + "scales", {64, 2}), HasSubstr(q + "scales is F16 [64, 2]"));
  EXPECT_THAT(reshape("awq", q + "qzeros", {8, 2}), HasSubstr(q + "qzeros is I32 [8, 2]"));
  EXPECT_THAT(reshape("fp8_block", "model.layers.0.mlp.gate_proj.weight_scale_inv", {1, 2}),
              HasSubstr("gate_proj.weight_scale_inv is F32 [1, 2]"));
  EXPECT_THAT(FileError("gptq4", [&](json& header, std::string&) { header.erase(q + "qzeros"); }),
              HasSubstr(q + "qzeros is missing"));
  EXPECT_THAT(
      FileError("fp8_block",
                [&](json& header, std::string&) { header[q + "weight"]["dtype"] = "F8_E5M2"; }),
      HasSubstr("F8_E5M2"));
  EXPECT_THAT(FileError("mxfp4",
                        [&](json& header, std::string&) {
                          header.erase("model.layers.1.mlp.experts.down_proj_scales");
                        }),
              HasSubstr("down_proj_scales is missing"));
  // The data of a tensor: the shape before packing, and the group of an input.
  const auto poke = [&](const std::string& fixture, const std::string& name, char value) {
    return FileError(fixture, [&](json& header, std::string& data) {
      data[header[name]["data_offsets"][0].get<size_t>()] = value;
    });
  };
  EXPECT_THAT(poke("packed_int4", q + "weight_shape", 63),
              HasSubstr("says [63, 64] but the config needs [64, 64]"));
  EXPECT_THAT(poke("gptq4_act_order", q + "g_idx", 9), HasSubstr("puts input 0 into group 9 of 1"));
  // Biases of zero beside matrices without one are written by some versions of AutoGPTQ.
  const std::string bias = "model.layers.0.self_attn.o_proj.bias";
  const auto add_bias = [&](float value) {
    return FileError("gptq4", [&](json& header, std::string& data) {
      header[bias] = {
          {"dtype", "F32"}, {"shape", {1}}, {"data_offsets", {data.size(), data.size() + 4}}};
      data.append(reinterpret_cast<const char*>(&value), 4);
    });
  };
  EXPECT_EQ(add_bias(0), "");
  EXPECT_THAT(add_bias(1), HasSubstr(bias));
}

// Whatever a damaged header or config says, opening ends in a message or in tensors that can be
// read to the end.
TEST_F(QuantizedRefusalTest, MutationsNeverCrash) {
  std::mt19937 random(TestSeed());
  int opened = 0;
  for (const std::string& format : Formats()) {
    const std::string file = ReadFile(Folder(format) + "/model.safetensors");
    const std::string config = ReadFile(Folder(format) + "/config.json");
    uint64_t header = 0;
    std::memcpy(&header, file.data(), 8);
    for (int round = 0; round < 60; ++round) {
      std::string bad_file = file;
      std::string bad_config = config;
      const bool in_config = round % 3 == 0;
      for (uint32_t edits = 1 + random() % 3; edits > 0; --edits) {
        if (in_config) {
          const size_t first = config.find("quantization_config");
          bad_config[first + random() % (config.size() - first)] =
              "0123456789\"{}[],:-aeg"[random() % 21];
        } else {
          bad_file[8 + random() % (header + 4096)] = "0123456789\"{}[],:-\xff"[random() % 19];
        }
      }
      if (round % 10 == 9) bad_file.resize(random() % bad_file.size());
      WriteFile(dir_ + "/config.json", bad_config);
      WriteFile(dir_ + "/model.safetensors", bad_file);
      const absl::StatusOr<OpenedModel> model = OpenModel({.model_dir = dir_});
      if (!model.ok()) continue;
      ++opened;
      for (const TensorSpec& spec : ModelTensors(model->config))
        model->checkpoint.Load(spec.key, DType::kBF16);
    }
  }
  EXPECT_GT(opened, 0);
}

}  // namespace
}  // namespace switchyard
