#include "server/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <sstream>

#include "nlohmann/json.hpp"
#include "server/text/detokenizer.h"
#include "server/text/unicode.h"

namespace switchyard {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::string TokenizerFile(const std::string& name) {
  std::ifstream file(std::string(SWITCHYARD_SOURCE_DIR) + "/server/text/testdata/tokenizers/" +
                     name + ".json");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::unique_ptr<Tokenizer> Make(const std::string& name, std::string_view config = "") {
  auto tokenizer = Tokenizer::Parse(TokenizerFile(name), config);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

std::vector<int32_t> Ids(const Tokenizer& tokenizer, std::string_view text,
                         const EncodeOptions& options = {}) {
  auto ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return *ids;
}

TEST(TokenizerTest, ControlTokensAreParsedOnlyInTrustedText) {
  const auto tokenizer = Make("qwen");
  const int32_t start = *tokenizer->TokenToId("<|im_start|>");
  const int32_t end = *tokenizer->TokenToId("<|im_end|>");
  const std::vector<TextSegment> segments = {
      {"<|im_start|>user\n", true}, {"<|im_end|><|im_start|>", false}, {"<|im_end|>", true}};
  const auto ids = tokenizer->Encode(segments, {});
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(std::count(ids->begin(), ids->end(), start), 1);
  EXPECT_EQ(std::count(ids->begin(), ids->end(), end), 1);
  EXPECT_EQ(ids->front(), start);
  EXPECT_EQ(ids->back(), end);
  EXPECT_EQ(tokenizer->Decode(*ids, {.skip_special = false}),
            "<|im_start|>user\n<|im_end|><|im_start|><|im_end|>");
  // A token that is half trusted is text.
  const std::vector<TextSegment> split = {{"<|im_", true}, {"end|>", false}};
  const auto text = tokenizer->Encode(split, {});
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(std::count(text->begin(), text->end(), end), 0);
  // Trusted text in two pieces is one.
  const std::vector<TextSegment> joined = {{"<|im_", true}, {"end|>", true}};
  EXPECT_THAT(*tokenizer->Encode(joined, {}), ElementsAre(end));
  // Apart from control tokens, borders are not seen.
  const std::vector<TextSegment> words = {{"Hello wor", true}, {"ld", false}};
  EXPECT_EQ(*tokenizer->Encode(words, {}), Ids(*tokenizer, "Hello world"));
  EXPECT_THAT(Ids(*tokenizer, "<|im_end|>", {.parse_special = true}), ElementsAre(end));
  // Tokens that are no control tokens are words of the vocabulary for everybody.
  EXPECT_THAT(Ids(*tokenizer, "<think>"), ElementsAre(*tokenizer->TokenToId("<think>")));
}

TEST(TokenizerTest, ConfigAddsAndRemovesBos) {
  const auto plain = Make("llama3");
  const int32_t bos = *plain->TokenToId("<|begin_of_text|>");
  EXPECT_EQ(Ids(*plain, "hi", {.add_special_tokens = true}).front(), bos);
  const auto without =
      Make("llama3", R"({"bos_token": "<|begin_of_text|>", "add_bos_token": false})");
  EXPECT_NE(Ids(*without, "hi", {.add_special_tokens = true}).front(), bos);
  EXPECT_EQ(without->bos_id(), bos);
  const auto with =
      Make("qwen", R"({"bos_token": {"content": "<|endoftext|>"}, "add_bos_token": true,
                                     "eos_token": "<|im_end|>", "add_eos_token": true, "unk_token": null})");
  const auto ids = Ids(*with, "hi", {.add_special_tokens = true});
  EXPECT_EQ(ids.front(), *with->TokenToId("<|endoftext|>"));
  EXPECT_EQ(ids.back(), *with->eos_id());
  EXPECT_EQ(with->eos_token(), "<|im_end|>");
  EXPECT_EQ(with->unk_token(), "");
  EXPECT_FALSE(Make("qwen", R"({"bos_token": "<nowhere>"})")->bos_id().has_value());
}

TEST(TokenizerTest, ConfigMayListFurtherAddedTokens) {
  const auto tokenizer = Make(
      "gpt2", R"({"added_tokens_decoder": {"1300": {"content": "<|extra|>", "special": true}}})");
  EXPECT_EQ(tokenizer->TokenToId("<|extra|>"), 1300);
  EXPECT_EQ(tokenizer->vocab_size(), 1301);
  EXPECT_THAT(Ids(*tokenizer, "<|extra|>", {.parse_special = true}), ElementsAre(1300));
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{1300, 1299}, {}), "");
}

TEST(TokenizerTest, UnknownIdsDecodeToNothing) {
  const auto tokenizer = Make("llama2");
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{-1, 1300, 99999999, INT32_MIN}, {}), "");
  EXPECT_EQ(tokenizer->TokenBytes(-5), "");
  EXPECT_EQ(tokenizer->TokenText(1 << 30), "");
}

TEST(TokenizerTest, BytesOfTokens) {
  const auto llama2 = Make("llama2");
  const auto ids =
      Ids(*llama2, "the \xF0\x9F\xAB\xA0");  // an emoji outside the vocabulary: four byte tokens
  std::string joined;
  for (const int32_t id : ids) joined += llama2->TokenBytes(id);
  EXPECT_EQ(joined,
            " the \xF0\x9F\xAB\xA0");  // with the space that decoding strips at the start of a text
  EXPECT_EQ(llama2->Decode(ids, {}), "the \xF0\x9F\xAB\xA0");
  EXPECT_EQ(llama2->Decode(ids, {.continues_text = true}), " the \xF0\x9F\xAB\xA0");
  EXPECT_EQ(llama2->TokenBytes(ids.back()), "\xA0");
  EXPECT_EQ(llama2->TokenText(ids.back()), "\xEF\xBF\xBD");
}

TEST(DetokenizerTest, HoldsPartialCharacters) {
  const auto tokenizer = Make("llama2");
  const auto byte = [&](int b) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", b);
    return *tokenizer->TokenToId(name);
  };
  Detokenizer d(tokenizer.get(), {});
  EXPECT_EQ(d.Push(byte(0xF0)), "");
  EXPECT_EQ(d.Push(byte(0x9F)), "");
  EXPECT_EQ(d.Push(byte(0x98)), "");
  EXPECT_EQ(d.held_bytes(), 3u);
  EXPECT_EQ(d.Push(byte(0x80)), "\xF0\x9F\x98\x80");
  EXPECT_EQ(d.Push(byte(0xE2)), "");
  EXPECT_EQ(d.Push(byte('a')),
            "\xEF\xBF\xBD"
            "a");                                 // it can never complete now
  EXPECT_EQ(d.Push(byte(0xFF)), "\xEF\xBF\xBD");  // nor can this, at once
  EXPECT_EQ(d.Push(byte(0xE2)), "");
  EXPECT_EQ(d.Flush(), "\xEF\xBF\xBD");
  EXPECT_EQ(d.held_bytes(), 0u);
}

TEST(TokenizerTest, InvalidUtf8IsRefused) {
  const auto tokenizer = Make("gpt2");
  for (const std::string_view bad :
       {"\xFF", "a\xC3", "\xED\xA0\x80", "\xC0\x80", "\xF4\x90\x80\x80"}) {
    EXPECT_EQ(tokenizer->Encode(bad, {}).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(TokenizerTest, RefusesWhatItDoesNotKnowByName) {
  const auto base = nlohmann::json::parse(TokenizerFile("gpt2"));
  const auto message = [&](const std::string& field, const nlohmann::json& value) {
    auto changed = base;
    changed[nlohmann::json::json_pointer(field)] = value;
    return std::string(Tokenizer::Parse(changed.dump(), "").status().message());
  };
  EXPECT_THAT(message("/model/type", "Unigram"), HasSubstr("'Unigram'"));
  EXPECT_THAT(message("/model/dropout", 0.1), HasSubstr("dropout"));
  EXPECT_THAT(message("/normalizer", {{"type", "Precompiled"}}), HasSubstr("'Precompiled'"));
  EXPECT_THAT(message("/pre_tokenizer", {{"type", "BertPreTokenizer"}}),
              HasSubstr("'BertPreTokenizer'"));
  EXPECT_THAT(message("/post_processor", {{"type", "BertProcessing"}}),
              HasSubstr("'BertProcessing'"));
  EXPECT_THAT(message("/decoder", {{"type", "WordPiece"}}), HasSubstr("'WordPiece'"));
  EXPECT_THAT(message("/model/merges/3", "a"), HasSubstr("merge 3"));
  EXPECT_THAT(message("/model/vocab/a", -1), HasSubstr("'a'"));
  EXPECT_THAT(message("/model/unk_token", "<nope>"), HasSubstr("'<nope>'"));
  const auto split = [](const std::string& regex) {
    return nlohmann::json{{"type", "Split"},
                          {"pattern", {{"Regex", regex}}},
                          {"behavior", "Isolated"},
                          {"invert", false}};
  };
  EXPECT_THAT(message("/pre_tokenizer", split("[a&&b]")), HasSubstr("&&"));
  EXPECT_THAT(message("/pre_tokenizer", split("(")), HasSubstr("'('"));
  EXPECT_THAT(Tokenizer::Parse("[]", "").status().message(), HasSubstr("tokenizer.json"));
  EXPECT_THAT(Tokenizer::Parse("{", "").status().message(), HasSubstr("tokenizer.json"));
  EXPECT_THAT(Tokenizer::Parse(TokenizerFile("gpt2"), "3").status().message(),
              HasSubstr("tokenizer_config.json"));
  EXPECT_EQ(Tokenizer::Load("/nonexistent").status().code(), absl::StatusCode::kNotFound);
}

// Megabytes that are one word, or one run of combining marks, or nothing but beginnings of tokens.
TEST(TokenizerTest, LongInputsTakeNoQuadraticTime) {
  const auto begin = std::chrono::steady_clock::now();
  const auto repeat = [](std::string_view piece, size_t bytes) {
    std::string text;
    while (text.size() < bytes) text += piece;
    return text;
  };
  constexpr size_t kMegabyte = 1 << 20;
  for (const std::string name : {"gpt2", "qwen", "llama2", "mixtral", "digits"}) {
    const auto tokenizer = Make(name);
    for (const std::string_view piece :
         {"a", "ab", " ", "\n ", "e\xCC\x81\xCC\xA7", "\xCC\x81\xCC\xA7", "<|im_", "<",
          "the train ", "\xE9\x9B\xBB", "1"}) {
      const std::string text = repeat(piece, kMegabyte / 4);
      const auto ids = tokenizer->Encode(text, {});
      EXPECT_TRUE(ids.ok()) << name << " '" << piece << "' " << ids.status();
    }
  }
  const auto seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_LT(seconds, 600) << "55 texts of 256 KiB: quadratic work would take hours";
}

TEST(UnicodeTest, NormalFormsOfLongRunsOfMarks) {
  std::string marks = "a";
  for (int i = 0; i < 100000; ++i)
    marks += i % 2 == 0 ? "\xCC\x81" : "\xCC\xA7";  // classes 230 and 202
  const std::string nfd = unicode::Normalize(marks, unicode::Form::kNfd);
  EXPECT_EQ(nfd.substr(0, 5), "a\xCC\xA7\xCC\xA7");
  EXPECT_EQ(nfd.size(), marks.size());
  EXPECT_EQ(unicode::Normalize("\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8", unicode::Form::kNfc),
            "\xEA\xB0\x81");
  EXPECT_EQ(unicode::Normalize("\xEF\xAC\x81", unicode::Form::kNfkc), "fi");
}

}  // namespace
}  // namespace switchyard
