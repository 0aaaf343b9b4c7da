// The OpenAI shapes: whole answers and stream chunks as JSON. Pure: values in, text out; one thread
// at a time.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/choice_assembler.h"
#include "server/generation.h"
#include "server/text/tokenizer.h"

namespace switchyard {

// What stands in every object of one answer.
struct AnswerIdentity {
  bool chat = false;
  std::string id;       // "chatcmpl-…" or "cmpl-…"
  int64_t created = 0;  // Unix seconds
  std::string model;
  bool logprobs = false;
  int32_t num_top_logprobs = 0;
  bool token_ids = false;
  const Tokenizer* tokenizer = nullptr;
};

// One choice, complete.
struct WholeChoice {
  std::string text;
  std::vector<OutputToken> tokens;
  std::vector<int32_t> token_ids;
  FinishReason finish = FinishReason::kNone;
};

std::string FormatWhole(const AnswerIdentity& identity, const std::vector<WholeChoice>& choices,
                        const Usage& usage);

// Chunks of a stream, each one event ("data: …\n\n"). `usage_asked`: other chunks then carry
// usage:null.
class StreamFormat {
 public:
  StreamFormat(AnswerIdentity identity, bool usage_asked)
      : identity_(std::move(identity)), usage_asked_(usage_asked) {}

  // The events of one delta: the role if it is the choice's first, text, end.
  std::string Delta(const ChoiceDelta& delta);
  std::string UsageChunk(const Usage& usage) const;
  static std::string Error(const absl::Status& status);
  static std::string_view Done() { return "data: [DONE]\n\n"; }

 private:
  const AnswerIdentity identity_;
  const bool usage_asked_;
  std::vector<bool> role_sent_;       // by choice
  std::vector<int64_t> text_offset_;  // characters sent, by choice
};

}  // namespace switchyard
