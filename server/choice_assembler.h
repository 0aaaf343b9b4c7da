// ChoiceAssembler: the tokens of one choice become text: detokenizing, stop strings, and logprobs
// that wait with held text. Every protocol's output comes from here, so streamed and whole answers
// are equal. Owned by a Generation, used by one thread at a time.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "proto/step_plan.h"
#include "scheduler/request.h"
#include "server/generation_request.h"
#include "server/text/detokenizer.h"
#include "server/text/stop_matcher.h"
#include "server/text/tokenizer.h"

namespace switchyard {

// A token that contributed to the text. The texts of a choice's tokens, joined, are its text.
struct OutputToken {
  int32_t id = 0;
  std::string text;     // what this token added; "" while a character is incomplete
  bool whole = true;    // false: a stop string cut into this token
  bool scored = false;  // logprob is set; not for the first token of an echoed prompt
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top;  // descending
};

// What is new of one choice.
struct ChoiceDelta {
  int32_t index = 0;
  std::string text;
  std::vector<OutputToken> tokens;  // only when logprobs were asked for
  std::vector<int32_t> token_ids;   // only when asked for: generated ids, the ending one too
  FinishReason finish = FinishReason::kNone;
};

class ChoiceAssembler {
 public:
  // `prompt` is echoed when the request says so.
  ChoiceAssembler(const GenerationRequest& request, const Engine& engine, int32_t index,
                  const std::vector<int32_t>& prompt);

  // Applies one event of the scheduler. REQUIRES: !finished().
  ChoiceDelta Push(ChoiceEvent& event);

  int32_t index() const { return index_; }
  bool finished() const { return finish_ != FinishReason::kNone; }
  // True when a stop string ended the choice, so that the scheduler must still be told.
  bool stopped_by_string() const { return stopped_by_string_; }
  int32_t num_generated() const { return num_generated_; }  // kept tokens, the ending one too

 private:
  struct HeldToken {
    OutputToken token;
    size_t end = 0;  // bytes of raw text up to and including this token
  };

  void EmitPrompt(ChoiceDelta* delta);
  void PushToken(int32_t id, const TokenLogprob* logprob, ChoiceDelta* delta);
  void Flush(ChoiceDelta* delta);
  void ReleaseTokens(ChoiceDelta* delta);

  const Tokenizer* const tokenizer_;
  const int32_t index_;
  const bool want_logprobs_;
  const bool want_ids_;
  const bool include_stop_;
  const bool echo_;
  const int32_t min_tokens_;
  std::vector<int32_t> prompt_;                // emptied once echoed
  std::vector<TokenLogprob> prompt_logprobs_;  // gathered until the first token
  Detokenizer detokenizer_;
  StopMatcher stops_;
  std::deque<HeldToken> held_;  // tokens whose text is not all sent
  size_t raw_bytes_ = 0;        // of detokenized text, sent or held
  size_t sent_bytes_ = 0;
  int32_t num_generated_ = 0;
  bool prompt_done_ = false;
  bool stopped_by_string_ = false;
  FinishReason finish_ = FinishReason::kNone;
};

}  // namespace switchyard
