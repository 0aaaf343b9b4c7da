// The added tokens of tokenizer.json: spellings that are found in the text before anything else
// cuts it.
//
// Owner: the Tokenizer; filled while loading, then immutable, any thread. Must never return
// overlapping matches.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace switchyard {

struct AddedToken {
  int32_t id = -1;
  std::string content;
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space on its left with it
  bool rstrip = false;
  bool normalized = true;  // looked for in the normalised text
  bool special = false;    // decodes to nothing with skip_special

  // A token with which the template steers the model, so that user text must not be able to spell
  // it: the special ones, and those of the shape <|…|> or <｜…｜> that some files (DeepSeek) do not
  // mark as special.
  bool IsControl() const;

  static absl::StatusOr<AddedToken> Create(const nlohmann::json& spec);  // "id" is optional here
};

// Leftmost-longest search for many spellings at once.
class AddedTokenMatcher {
 public:
  struct Match {
    size_t begin, end;  // with the white space that the token takes along
    int32_t id;
  };

  // `spelling` is what the text must contain (the content, perhaps normalised); empty ones are
  // ignored.
  void Add(const AddedToken& token, std::string_view spelling);
  bool empty() const { return tokens_.empty(); }

  // Appends the matches from left to right. `allowed(token, begin, end)` may forbid one (begin, end
  // without white space); then a shorter spelling at the same place is tried.
  using Allowed = std::function<bool(const AddedToken& token, size_t begin, size_t end)>;
  void FindAll(std::string_view text, const Allowed& allowed, std::vector<Match>* matches) const;

 private:
  // A trie. next_: (node << 8 | byte) → node; node 0 is the root.
  absl::flat_hash_map<uint64_t, uint32_t> next_;
  std::vector<int32_t> token_at_node_ = {-1};  // index into tokens_
  std::vector<AddedToken> tokens_;
  std::vector<bool> starts_ = std::vector<bool>(256);  // bytes that begin a spelling
};

}  // namespace switchyard
