// Turns the ids of one choice into text as they arrive. The deltas, with the flush, equal
// Tokenizer::Decode of all ids.
//
// Owner: the request that streams; not thread-safe; the tokenizer must outlive it. Must never emit
// half a character: an incomplete UTF-8 tail is held (at most 3 bytes) until it completes, becomes
// impossible (then U+FFFD), or Flush.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "server/text/tokenizer.h"

namespace switchyard {

class Detokenizer {
 public:
  Detokenizer(const Tokenizer* tokenizer, const DecodeOptions& options);

  // The text that `id` makes certain; "" while a character is incomplete or the token is skipped.
  std::string Push(int32_t id);
  // What is still held, as U+FFFD; call once, at the end. Further Push calls are not allowed.
  std::string Flush();

  // Number of bytes held. 0: the text so far is exactly what the ids so far stand for.
  size_t held_bytes() const { return held_.size(); }

 private:
  const Tokenizer* tokenizer_;
  const DecodeOptions options_;
  bool first_ = true;    // no token yet
  size_t num_to_strip_;  // leading characters still to be dropped
  std::string held_;     // the beginning of one character
};

}  // namespace switchyard
