// The fuzzers' entries on mutated inputs, for seconds and with a fixed seed.
#include <gtest/gtest.h>

#include <fstream>
#include <random>
#include <sstream>

#include "server/text/fuzz_entry.h"

namespace switchyard {
namespace {

constexpr uint32_t kSeed = 424242;

std::string ReadAll(const std::string& name) {
  std::ifstream file(std::string(SWITCHYARD_SOURCE_DIR) + "/server/text/testdata/" + name);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// Cuts, repeats, splices and flips.
std::string Mutate(std::string text, const std::vector<std::string>& words, std::mt19937* rng) {
  const auto pick = [&](size_t n) { return n == 0 ? 0 : (*rng)() % n; };
  for (size_t edits = 1 + pick(4); edits > 0; --edits) {
    const size_t at = pick(text.size() + 1);
    const size_t size = pick(std::min<size_t>(text.size() - at, 40) + 1);
    switch (pick(5)) {
      case 0:
        text.erase(at, size);
        break;
      case 1:
        text.insert(at, text.substr(pick(text.size() + 1), pick(40)));
        break;
      case 2:
        text.insert(at, words[pick(words.size())]);
        break;
      case 3:
        if (at < text.size()) text[at] = static_cast<char>(pick(256));
        break;
      case 4:
        text.replace(at, size, words[pick(words.size())]);
        break;
    }
  }
  return text;
}

TEST(TextMutationTest, TokenizerFiles) {
  SCOPED_TRACE(kSeed);
  std::mt19937 rng(kSeed);
  const std::vector<std::string> words = {
      "null",       "true",        "-1",           "1e99",          "\"\"",      "[]",
      "{}",         "99999999999", "\"Sequence\"", "\"ByteLevel\"", "\"Split\"", "\"Metaspace\"",
      "\"Strip\"",  "\"Replace\"", "\"(?<=\"",     "\"\\\\p{L}+\"", ",",         ":",
      "\"\\ud800\""};
  for (const std::string name : {"mixed", "llama2", "llama3", "qwen"}) {
    // A short vocabulary, so that mutations hit the structure.
    auto json = nlohmann::json::parse(ReadAll("tokenizers/" + name + ".json"));
    json["model"]["merges"] = nlohmann::json::array();
    nlohmann::json vocab;
    for (const auto& [token, id] : json["model"]["vocab"].items()) {
      if (id < 40 || token == "<unk>") vocab[token] = id;
    }
    json["model"]["vocab"] = vocab;
    const std::string base = json.dump();
    for (int i = 0; i < 1500; ++i) FuzzTokenizer(Mutate(base, words, &rng));
  }
}

TEST(TextMutationTest, Templates) {
  SCOPED_TRACE(kSeed);
  std::mt19937 rng(kSeed);
  const auto golden = nlohmann::json::parse(ReadAll("templates.json"));
  std::vector<std::string> sources = golden["templates"].get<std::vector<std::string>>();
  const std::vector<std::string> words = {"{%",
                                          "%}",
                                          "{{",
                                          "}}",
                                          "{#",
                                          "-%}",
                                          "for x in messages",
                                          "endfor",
                                          "if",
                                          "else",
                                          "endif",
                                          " and ",
                                          " is ",
                                          "|",
                                          "(",
                                          ")",
                                          "[",
                                          "]",
                                          "::-1",
                                          "'",
                                          "\"",
                                          "\\",
                                          "set ",
                                          "macro f(a)",
                                          "endmacro",
                                          "range(100000)",
                                          "**",
                                          "//",
                                          "%",
                                          "9223372036854775807",
                                          "messages",
                                          "loop.index",
                                          "namespace()",
                                          "~",
                                          "tojson",
                                          "\xF0\x9F\x98\x80",
                                          "\xFF",
                                          "1e308"};
  for (int i = 0; i < 12000; ++i)
    FuzzTemplate(Mutate(sources[rng() % sources.size()], words, &rng));
}

}  // namespace
}  // namespace switchyard
