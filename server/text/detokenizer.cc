#include "server/text/detokenizer.h"

#include "server/text/tokenizer_parts.h"
#include "server/text/unicode.h"

namespace switchyard {

Detokenizer::Detokenizer(const Tokenizer* tokenizer, const DecodeOptions& options)
    : tokenizer_(tokenizer),
      options_(options),
      first_(!options.continues_text),
      num_to_strip_(options.continues_text ? 0 : tokenizer->parts_->decoder.num_stripped()) {}

std::string Detokenizer::Push(int32_t id) {
  const Tokenizer::Parts& parts = *tokenizer_->parts_;
  if (id < 0 || id >= tokenizer_->vocab_size() || !parts.tokens[static_cast<size_t>(id)].exists)
    return "";
  if (options_.skip_special && parts.tokens[static_cast<size_t>(id)].special) return "";
  std::string_view bytes = parts.BytesOf(id, first_);
  std::string out;
  if (parts.spaces_between && !first_) unicode::AppendLossy(" ", /*flush=*/false, &held_, &out);
  first_ = false;
  while (num_to_strip_ > 0 && !bytes.empty()) {
    if (bytes[0] != parts.decoder.strip_char()) {
      num_to_strip_ = 0;
      break;
    }
    bytes.remove_prefix(1);
    --num_to_strip_;
  }
  unicode::AppendLossy(bytes, /*flush=*/false, &held_, &out);
  return out;
}

std::string Detokenizer::Flush() {
  std::string out;
  unicode::AppendLossy("", /*flush=*/true, &held_, &out);
  return out;
}

}  // namespace switchyard
