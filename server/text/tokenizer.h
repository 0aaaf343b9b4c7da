// The tokenizer of a checkpoint: tokenizer.json (+ tokenizer_config.json) as HF's `tokenizers`
// reads it, for byte-level BPE (GPT-2, Llama-3, Qwen, OLMo, DeepSeek, gpt-oss) and
// SentencePiece-style BPE with byte fallback (Llama-2, Mixtral).
//
// Owner: the server room; one instance per model, immutable after Load. Thread-safe: Encode and
// Decode may run on any number of threads at once (they share one bounded cache of words). Encoding
// is CPU work of about 10 MB/s: never call it on an I/O thread. Must never abort or throw on any
// text or id: text that is not UTF-8 is an InvalidArgument.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace switchyard {

// A run of text with one origin. Control tokens are recognised only where every byte comes from
// trusted text.
struct TextSegment {
  std::string text;
  bool trusted = false;  // true: the chat template's own words; false: somebody's words, in which
                         // "<|im_end|>" is text
};

struct EncodeOptions {
  bool add_special_tokens =
      false;  // run the post-processor (bos, eos), as the model's own default for raw prompts
  bool parse_special = false;  // control tokens spelled in untrusted text become control tokens
};

struct DecodeOptions {
  bool skip_special = true;     // special tokens decode to ""
  bool continues_text = false;  // the ids follow other text: keep the space that a SentencePiece
                                // decoder strips at its start
};

class Tokenizer {
 public:
  // Reads `dir`/tokenizer.json and, where there, tokenizer_config.json. NotFound without a
  // tokenizer.json; InvalidArgument names the component or field that is not understood.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::filesystem::path& dir);
  // The same from the files' contents; `config_json` may be empty.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Parse(std::string_view tokenizer_json,
                                                          std::string_view config_json);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              const EncodeOptions& options) const;
  // The segments are one text: the pattern runs across their borders, only control tokens respect
  // them.
  absl::StatusOr<std::vector<int32_t>> Encode(absl::Span<const TextSegment> segments,
                                              const EncodeOptions& options) const;

  // Valid UTF-8, with U+FFFD for bytes that form no character. Ids beyond the tokenizer (a model's
  // vocabulary may be larger) and negative ids decode to "". Equals what a Detokenizer emits for
  // the same ids.
  std::string Decode(absl::Span<const int32_t> ids, const DecodeOptions& options) const;

  // The bytes a token stands for within a text ("▁a" → " a", byte tokens one byte, perhaps not
  // UTF-8 on their own). Special tokens give their spelling. "" beyond the vocabulary. For
  // logprobs' `bytes`.
  std::string_view TokenBytes(int32_t id) const;
  // TokenBytes as valid UTF-8 (U+FFFD for partial characters), for logprobs' `token`.
  std::string TokenText(int32_t id) const;

  int32_t vocab_size() const;  // 1 + the highest id
  bool IsSpecial(int32_t id) const;
  std::optional<int32_t> TokenToId(std::string_view token) const;  // spelling as in tokenizer.json

  // From tokenizer_config.json: spelling ("" where there is none) and id (nullopt where none or
  // unknown).
  const std::string& bos_token() const;
  const std::string& eos_token() const;
  const std::string& unk_token() const;
  const std::string& pad_token() const;
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;

 private:
  friend class Detokenizer;
  struct Parts;
  explicit Tokenizer(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts>
      parts_;  // constant after construction, except for the cache, which locks itself
};

}  // namespace switchyard
