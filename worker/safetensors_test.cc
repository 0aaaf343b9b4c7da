#include "worker/safetensors.h"

#include <cstring>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/test_seed.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

// A file: length field, header, data bytes.
std::string FileOf(const std::string& header, size_t data_bytes) {
  std::string file(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(file.data(), &length, 8);
  return file + header + std::string(data_bytes, '\1');
}

absl::StatusOr<StoredTensors> Parse(const std::string& file) {
  return ParseSafetensorsHeader(std::as_bytes(std::span(file)), file.size(), "f.safetensors");
}

std::string ErrorOf(const std::string& file) { return std::string(Parse(file).status().message()); }

const char kGood[] =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
    R"("b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"s":{"dtype":"F16","shape":[],"data_offsets":[32,34]}})";

TEST(SafetensorsTest, ReadsAGoodHeader) {
  const auto tensors = Parse(FileOf(kGood, 34));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 3u);
  EXPECT_EQ(tensors->at("a").dtype, StoredDType::kF32);
  EXPECT_EQ(tensors->at("b").begin, 8 + sizeof(kGood) - 1 + 24);
  EXPECT_EQ(tensors->at("b").end - tensors->at("b").begin, 8u);
}

TEST(SafetensorsTest, HostileFilesNameTheNumbers) {
  EXPECT_THAT(ErrorOf("abc"), HasSubstr("has 3 bytes"));
  EXPECT_THAT(ErrorOf(FileOf(kGood, 33)), HasSubstr("[32, 34) of 33 data bytes"));
  EXPECT_THAT(ErrorOf(FileOf(kGood, 34).substr(0, 50)), HasSubstr("but the file has 50"));
  EXPECT_THAT(ErrorOf(std::string(8, '\xff') + "{}"), HasSubstr("18446744073709551615"));
  EXPECT_THAT(ErrorOf(FileOf("[]", 0)), HasSubstr("not a JSON object"));
  EXPECT_THAT(ErrorOf(FileOf("{", 0)), HasSubstr("not a JSON object"));
  EXPECT_THAT(ErrorOf(FileOf(std::string(100000, '['), 0)), HasSubstr("not a JSON object"));
  const auto one = [](const std::string& dtype, const std::string& shape,
                      const std::string& offsets) {
    return FileOf(absl::StrCat(R"({"t":{"dtype":")", dtype, R"(","shape":)", shape,
                               R"(,"data_offsets":)", offsets, "}}"),
                  64);
  };
  EXPECT_THAT(ErrorOf(one("F32", "[3]", "[0,16]")), HasSubstr("needs 12 bytes but has 16"));
  EXPECT_THAT(ErrorOf(one("F32", "[4]", "[16,0]")), HasSubstr("[16, 0)"));
  EXPECT_THAT(ErrorOf(one("F32", "[4]", "[0,18446744073709551615]")),
              HasSubstr("18446744073709551615"));
  EXPECT_THAT(ErrorOf(one("F32", "[4294967296,4294967296]", "[0,0]")), HasSubstr("too large"));
  EXPECT_THAT(ErrorOf(one("F32", "[-1]", "[0,4]")), HasSubstr("bad shape"));
  EXPECT_THAT(ErrorOf(one("F32", "[1.5]", "[0,4]")), HasSubstr("bad shape"));
  EXPECT_THAT(ErrorOf(one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]")), HasSubstr("dimensions"));
  EXPECT_THAT(ErrorOf(FileOf(R"({"t":3})", 0)), HasSubstr("lacks"));
  EXPECT_THAT(ErrorOf(FileOf(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                             R"("u":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
                             6)),
              HasSubstr("overlap"));
}

TEST(SafetensorsTest, MutatedFilesNeverReachOutside) {
  std::mt19937 random(TestSeed());
  const std::string good = FileOf(kGood, 34);
  for (int round = 0; round < 50000; ++round) {
    std::string file = good;
    for (int edits = 1 + static_cast<int>(random() % 3); edits > 0; --edits) {
      file[random() % file.size()] =
          static_cast<char>(random() % 2 == 0 ? '0' + random() % 10 : random() % 256);
    }
    if (random() % 4 == 0) file.resize(random() % file.size());
    const auto tensors = Parse(file);
    if (!tensors.ok()) continue;
    for (const auto& [name, tensor] : *tensors) {
      ASSERT_LE(tensor.begin, tensor.end);
      ASSERT_LE(tensor.end, file.size());
    }
  }
}

TEST(SafetensorsTest, OpensAndReadsAFile) {
  const std::string path = absl::StrCat(testing::TempDir(), "/open_test.safetensors");
  std::ofstream(path, std::ios::binary) << FileOf(kGood, 34);
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const std::span<const std::byte> data = (*file)->Data((*file)->tensors().at("a"));
  EXPECT_EQ(data.size(), 24u);
  EXPECT_EQ(data[0], std::byte{1});
  (*file)->Release(data);
  EXPECT_EQ(data[23], std::byte{1});  // still there, read again from the file
  EXPECT_EQ(SafetensorsFile::Open(path + ".none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(SafetensorsFile::Open(testing::TempDir()).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace switchyard
