// What a Tokenizer consists of after loading. Private to tokenizer*.cc and detokenizer.cc.
//
// Owner: the Tokenizer; constant after Parse. Must never be seen outside server/text.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "nlohmann/json.hpp"
#include "server/text/added_tokens.h"
#include "server/text/bpe.h"
#include "server/text/normalizer.h"
#include "server/text/pre_tokenizer.h"
#include "server/text/token_decoder.h"
#include "server/text/tokenizer.h"

namespace switchyard {

struct Tokenizer::Parts {
  struct TokenInfo {
    std::string bytes;  // within a text
    bool exists = false;
    bool special = false;
    std::optional<std::string> first_bytes;  // as the first token of a text, where that differs
  };
  struct SpecialString {
    std::string text;
    std::optional<int32_t> id;
  };

  std::unique_ptr<Bpe> bpe;
  std::unique_ptr<Normalizer> normalizer;
  std::unique_ptr<PreTokenizer> pre_tokenizer;
  TokenDecoder decoder;
  bool spaces_between = false;  // no decoder: tokens are joined by spaces

  AddedTokenMatcher
      raw_tokens;  // found in the raw text: control tokens, and those with normalized = false
  AddedTokenMatcher normalized_tokens;  // the others, found in the normalised text
  std::vector<AddedToken> added;
  std::vector<TokenInfo> tokens;  // by id

  std::vector<int32_t> prefix_ids, suffix_ids;  // what the post-processor puts around a text
  SpecialString bos, eos, unk, pad;

  // Loading, in this order (tokenizer_load.cc).
  absl::Status ReadAddedTokens(const nlohmann::json& tokenizer, const nlohmann::json& config);
  absl::Status ReadPostProcessor(const nlohmann::json& spec);
  absl::Status ReadConfig(const nlohmann::json& config);
  absl::Status FillTokens();

  std::optional<int32_t> IdOf(std::string_view token) const;
  // The bytes of `id` in a decoded text; "" beyond the vocabulary.
  std::string_view BytesOf(int32_t id, bool first) const;
};

}  // namespace switchyard
