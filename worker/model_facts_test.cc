// The facts of a folder: what the scheduler knows without a worker, and a hash that follows every
// part of the checkpoint.
#include "worker/model_facts.h"

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

std::string Fixture(const std::string& name) {
  return absl::StrCat(SWITCHYARD_SOURCE_DIR, "/tests/fixtures/", name);
}

uint64_t HashOf(const std::string& dir) {
  const absl::StatusOr<ModelFacts> facts = ReadModelFacts({.model_dir = dir});
  EXPECT_TRUE(facts.ok()) << facts.status();
  return facts.ok() ? facts->model_hash : 0;
}

TEST(ModelFactsTest, DescribesTheModel) {
  const absl::StatusOr<ModelFacts> facts =
      ReadModelFacts({.model_dir = Fixture("qwen3_moe"), .isa = "portable", .max_model_len = 100});
  ASSERT_TRUE(facts.ok()) << facts.status();
  EXPECT_EQ(facts->info.name, "qwen3_moe");
  EXPECT_EQ(facts->info.max_model_len, 100);
  EXPECT_EQ(facts->info.num_kv_blocks, 0);
  EXPECT_THAT(facts->info.numerics_id,
              testing::AllOf(HasSubstr("cpu/portable/"), HasSubstr("/float32")));
  EXPECT_GT(facts->expert_bytes, 0);
}

TEST(ModelFactsTest, WrongOptionsAreErrorsWithNumbers) {
  const auto error_of = [](const ModelFactsOptions& options) {
    return std::string(ReadModelFacts(options).status().message());
  };
  EXPECT_THAT(error_of({.model_dir = Fixture("qwen3_moe"), .dtype = "int8"}),
              HasSubstr("\"int8\""));
  EXPECT_THAT(error_of({.model_dir = Fixture("qwen3_moe"), .isa = "sse9"}), HasSubstr("sse9"));
  EXPECT_THAT(error_of({.model_dir = Fixture("qwen3_moe"), .max_model_len = -1}),
              HasSubstr("max_model_len is -1"));
  EXPECT_THAT(error_of({.model_dir = Fixture("nowhere")}), HasSubstr("cannot open"));
}

TEST(ModelFactsTest, TheHashFollowsConfigAndWeights) {
  const uint64_t original = HashOf(Fixture("mixtral"));
  EXPECT_NE(original, HashOf(Fixture("olmoe")));
  const std::string dir = absl::StrCat(testing::TempDir(), "/model_facts");
  std::filesystem::remove_all(dir);
  std::filesystem::copy(Fixture("mixtral"), dir);
  EXPECT_EQ(HashOf(dir), original);  // the folder's name and place do not matter

  // One byte in the middle of one tensor.
  const std::string path = dir + "/model.safetensors";
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const StoredTensor tensor = (*file)->tensors().at("model.norm.weight");
  {
    std::fstream bytes(path, std::ios::in | std::ios::out | std::ios::binary);
    bytes.seekp(static_cast<std::streamoff>((tensor.begin + tensor.end) / 2));
    bytes.put(1);
  }
  const uint64_t changed = HashOf(dir);
  EXPECT_NE(changed, original);
  std::ofstream(dir + "/config.json", std::ios::app) << "\n";
  EXPECT_NE(HashOf(dir), changed);
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace switchyard
