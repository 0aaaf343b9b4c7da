// The `pre_tokenizer` of tokenizer.json: cuts normalised text into words, inside which BPE merges.
// Known: ByteLevel, Split, Digits, Metaspace, Whitespace, WhitespaceSplit, Punctuation, Sequence;
// anything else is refused by name.
//
// Owner: the Tokenizer; immutable after Create, any thread. Must never make an empty word.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace switchyard {

// A text cut into words: word i is text[ends[i-1], ends[i]).
struct Words {
  std::string text;
  std::vector<size_t> ends;
  bool at_start =
      false;  // the first word begins where the whole input begins (Metaspace's "first")

  void Add(std::string_view word) {
    if (word.empty()) return;
    text += word;
    ends.push_back(text.size());
  }
};

class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  // Cuts every word of `*words` further. REQUIRES: valid UTF-8; it stays so.
  virtual absl::Status Apply(Words* words) const = 0;

  static absl::StatusOr<std::unique_ptr<PreTokenizer>> Create(
      const nlohmann::json& spec);  // null: no cuts
};

}  // namespace switchyard
