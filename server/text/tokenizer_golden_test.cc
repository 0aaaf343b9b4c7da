// Equal ids and equal decoded text to HF's `tokenizers`, on the strings and tokenizers of testdata/
// (make_tokenizers.py).
#include <gtest/gtest.h>

#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "server/text/detokenizer.h"
#include "server/text/tokenizer.h"
#include "server/text/unicode.h"

namespace switchyard {
namespace {

constexpr size_t kNumPlain = 5200;  // strings before those that spell special tokens
constexpr size_t kNumPart = 400;    // of them, used with the tokenizers outside kFull

std::string ReadAll(const std::string& name) {
  const std::string path = std::string(SWITCHYARD_SOURCE_DIR) + "/server/text/testdata/" + name;
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<int32_t> Unpack(std::string_view packed) {
  const auto digit = [](char c) {
    return c >= 'A' && c <= 'Z'   ? c - 'A'
           : c >= 'a' && c <= 'z' ? c - 'a' + 26
           : c >= '0' && c <= '9' ? c - '0' + 52
           : c == '+'             ? 62
                                  : 63;
  };
  std::vector<int32_t> ids;
  for (size_t i = 0; i + 1 < packed.size(); i += 2)
    ids.push_back(digit(packed[i]) * 64 + digit(packed[i + 1]));
  return ids;
}

struct Golden {
  std::unique_ptr<Tokenizer> tokenizer;
  std::vector<std::string> strings;
  std::vector<std::vector<int32_t>> ids;
  nlohmann::json cases;
};

Golden LoadGolden(const std::string& name) {
  Golden golden;
  auto tokenizer = Tokenizer::Parse(ReadAll("tokenizers/" + name + ".json"), "");
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  if (!tokenizer.ok()) return golden;
  golden.tokenizer = *std::move(tokenizer);
  golden.strings = nlohmann::json::parse(ReadAll("strings.json")).get<std::vector<std::string>>();
  golden.cases = nlohmann::json::parse(ReadAll("tokenizers/" + name + ".cases.json"));
  std::istringstream lines(ReadAll("tokenizers/" + name + ".ids"));
  for (std::string line; std::getline(lines, line);) golden.ids.push_back(Unpack(line));
  if (golden.ids.size() < golden.strings.size()) {  // a part only
    std::vector<std::vector<int32_t>> all(golden.strings.size());
    for (size_t i = 0; i < golden.ids.size(); ++i) {
      all[i < kNumPart ? i : i - kNumPart + kNumPlain] = std::move(golden.ids[i]);
    }
    golden.ids = std::move(all);
  }
  return golden;
}

bool IsFull(const std::string& name) {
  return name == "gpt2" || name == "qwen" || name == "llama3" || name == "llama2" ||
         name == "mixtral";
}

class TokenizerGoldenTest : public testing::TestWithParam<std::string> {};

TEST_P(TokenizerGoldenTest, SameIds) {
  const Golden golden = LoadGolden(GetParam());
  ASSERT_NE(golden.tokenizer, nullptr);
  size_t compared = 0, wrong = 0;
  for (size_t i = 0; i < golden.strings.size(); ++i) {
    if (!IsFull(GetParam()) && i >= kNumPart && i < kNumPlain) continue;
    const auto ids = golden.tokenizer->Encode(golden.strings[i], {.parse_special = true});
    ASSERT_TRUE(ids.ok()) << ids.status();
    ++compared;
    if (*ids == golden.ids[i]) continue;
    if (++wrong <= 10)
      ADD_FAILURE() << "string " << i << " '" << golden.strings[i] << "'\n  ours "
                    << testing::PrintToString(*ids) << "\n  want "
                    << testing::PrintToString(golden.ids[i]);
  }
  EXPECT_EQ(wrong, 0) << "of " << compared;
  EXPECT_GE(compared, IsFull(GetParam()) ? 5500 : 700);
}

TEST_P(TokenizerGoldenTest, SpecialTokensAsText) {
  const Golden golden = LoadGolden(GetParam());
  ASSERT_NE(golden.tokenizer, nullptr);
  for (const auto& item : golden.cases["text_ids"]) {
    const std::string& text = golden.strings[item[0].get<size_t>()];
    const auto ids = golden.tokenizer->Encode(text, {});
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, Unpack(item[1].get<std::string>())) << "'" << text << "'";
  }
}

TEST_P(TokenizerGoldenTest, WithBos) {
  const Golden golden = LoadGolden(GetParam());
  ASSERT_NE(golden.tokenizer, nullptr);
  for (const auto& item : golden.cases["with_bos"]) {
    const auto ids = golden.tokenizer->Encode(golden.strings[item[0].get<size_t>()],
                                              {.add_special_tokens = true, .parse_special = true});
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, Unpack(item[1].get<std::string>()));
  }
}

TEST_P(TokenizerGoldenTest, SameText) {
  const Golden golden = LoadGolden(GetParam());
  ASSERT_NE(golden.tokenizer, nullptr);
  for (const auto& item : golden.cases["decode"]) {
    const auto ids = Unpack(item[0].get<std::string>());
    EXPECT_EQ(golden.tokenizer->Decode(ids, {.skip_special = false}), item[1].get<std::string>())
        << testing::PrintToString(ids);
    EXPECT_EQ(golden.tokenizer->Decode(ids, {.skip_special = true}), item[2].get<std::string>())
        << testing::PrintToString(ids);
  }
}

TEST_P(TokenizerGoldenTest, LosslessWhereTheTokenizerIs) {
  const std::string name = GetParam();
  if (name != "gpt2" && name != "llama3" && name != "o200k" && name != "deepseek" &&
      name != "llama2" && name != "mixtral") {
    return;  // the others normalise or drop characters
  }
  const Golden golden = LoadGolden(name);
  ASSERT_NE(golden.tokenizer, nullptr);
  for (const std::string& text : golden.strings) {
    const auto ids = golden.tokenizer->Encode(text, {});
    ASSERT_TRUE(ids.ok());
    if (name == "mixtral" && (text.starts_with(" ") || text.starts_with("▁")))
      continue;  // no "▁" is prepended
    std::string want = text;
    if (name == "llama2" || name == "mixtral") {  // "▁" is how they write a space
      for (size_t at = 0; (at = want.find("▁", at)) != std::string::npos;)
        want.replace(at, 3, 1, ' ');
    }
    EXPECT_EQ(golden.tokenizer->Decode(*ids, {}), want) << "'" << text << "'";
  }
}

TEST_P(TokenizerGoldenTest, StreamedTextEqualsTheWhole) {
  const Golden golden = LoadGolden(GetParam());
  ASSERT_NE(golden.tokenizer, nullptr);
  const uint32_t seed = 12345;
  SCOPED_TRACE(seed);
  std::mt19937 rng(seed);
  for (int round = 0; round < 2000; ++round) {
    std::vector<int32_t> ids;
    if (round % 2 == 0) {  // token runs that begin and end within characters
      const auto& source = golden.ids[rng() % golden.ids.size()];
      if (source.empty()) continue;
      const size_t begin = rng() % source.size();
      ids.assign(
          source.begin() + static_cast<ptrdiff_t>(begin),
          source.begin() + static_cast<ptrdiff_t>(begin + rng() % (source.size() - begin + 1)));
    } else {
      for (size_t n = rng() % 12; n > 0; --n) {
        ids.push_back(static_cast<int32_t>(
            rng() % static_cast<uint32_t>(golden.tokenizer->vocab_size() + 5)));
      }
    }
    const DecodeOptions options{.skip_special = rng() % 2 == 0, .continues_text = rng() % 2 == 0};
    Detokenizer detokenizer(golden.tokenizer.get(), options);
    std::string streamed;
    for (const int32_t id : ids) {
      const std::string delta = detokenizer.Push(id);
      EXPECT_TRUE(unicode::IsValidUtf8(delta));
      EXPECT_LE(detokenizer.held_bytes(), 3u);
      streamed += delta;
    }
    streamed += detokenizer.Flush();
    EXPECT_EQ(streamed, golden.tokenizer->Decode(ids, options));
    // What was certain early is a prefix of every continuation.
    std::string bytes;
    for (const int32_t id : ids) {
      if (!options.skip_special || !golden.tokenizer->IsSpecial(id))
        bytes += golden.tokenizer->TokenBytes(id);
    }
    if (options.continues_text && GetParam() != "mixed" &&
        GetParam() != "whitespace") {  // those join by spaces
      EXPECT_EQ(streamed, unicode::Lossy(bytes));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, TokenizerGoldenTest,
                         testing::Values("gpt2", "qwen", "llama3", "llama2", "mixtral", "metaspace",
                                         "deepseek", "o200k", "digits", "mixed", "whitespace"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace switchyard
