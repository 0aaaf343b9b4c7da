// The `decoder` of tokenizer.json, applied to one token at a time: what bytes a token stands for.
// Known: ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace, Sequence; anything else is
// refused by name, and so is a step that needs to see several tokens (text must be able to stream),
// except for stripping at the start.
//
// Owner: the Tokenizer; immutable after Create, any thread. Must never need a token's neighbours.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "server/text/pattern.h"

namespace switchyard {

class TokenDecoder {
 public:
  static absl::StatusOr<TokenDecoder> Create(
      const nlohmann::json& spec);  // null: tokens stand for their spelling

  // The bytes of `token` within a text. Added tokens are not spelled in byte-level characters.
  // Fails only where a pattern runs away.
  absl::StatusOr<std::string> Bytes(std::string_view token, bool added) const;

  // What is different at the start of a text that continues nothing.
  // The first token loses all of this ("": nothing), as Metaspace decodes …
  const std::string& dropped_from_first_token() const { return dropped_from_first_; }
  // … and of the whole text, up to this many leading `strip_char` are removed.
  size_t num_stripped() const { return num_stripped_; }
  char strip_char() const { return strip_char_; }

 private:
  enum class Kind { kByteLevel, kByteFallback, kReplace, kStrip };
  struct Step {
    Kind kind;
    Pattern pattern;             // kReplace
    std::string content;         // kReplace: what replaces; kStrip: the character
    size_t start = 0, stop = 0;  // kStrip: how many
  };
  absl::Status AddStep(const nlohmann::json& spec, int depth);
  absl::Status AddStrip(const nlohmann::json& spec);

  std::vector<Step> steps_;
  bool fused_ = false;  // while creating: a Fuse came before
  std::string dropped_from_first_;
  size_t num_stripped_ = 0;
  char strip_char_ = ' ';
};

}  // namespace switchyard
