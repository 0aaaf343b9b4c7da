#include "server/choice_assembler.h"

#include <algorithm>
#include <iterator>

#include "kernels/check.h"

namespace switchyard {

ChoiceAssembler::ChoiceAssembler(const GenerationRequest& request, const Engine& engine,
                                 int32_t index, const std::vector<int32_t>& prompt)
    : tokenizer_(engine.tokenizer),
      index_(index),
      want_logprobs_(request.logprobs >= 0),
      want_ids_(request.return_token_ids),
      include_stop_(request.include_stop),
      echo_(request.echo),
      min_tokens_(request.min_tokens),
      detokenizer_(engine.tokenizer, {.skip_special = true, .continues_text = true}),
      stops_(request.stop, request.include_stop),
      prompt_done_(!request.echo) {
  if (echo_) prompt_ = prompt;
}

// The prompt in front of the answer. Its text is that of its tokens, so that logprobs and text
// agree. It is no answer: stop strings are not searched in it.
void ChoiceAssembler::EmitPrompt(ChoiceDelta* delta) {
  prompt_done_ = true;
  Detokenizer detokenizer(tokenizer_, {.skip_special = true, .continues_text = false});
  for (size_t i = 0; i < prompt_.size(); ++i) {
    OutputToken token{.id = prompt_[i], .text = detokenizer.Push(prompt_[i]), .top = {}};
    if (i + 1 == prompt_.size()) token.text += detokenizer.Flush();
    if (i > 0 && i - 1 < prompt_logprobs_.size()) {
      token.scored = true;
      token.logprob = prompt_logprobs_[i - 1].logprob;
      token.top = std::move(prompt_logprobs_[i - 1].top);
    }
    delta->text += token.text;
    if (want_logprobs_) delta->tokens.push_back(std::move(token));
  }
  prompt_.clear();
  prompt_logprobs_.clear();
}

ChoiceDelta ChoiceAssembler::Push(ChoiceEvent& event) {
  SY_CHECK(!finished());
  ChoiceDelta delta;
  delta.index = index_;
  std::move(event.prompt_logprobs.begin(), event.prompt_logprobs.end(),
            std::back_inserter(prompt_logprobs_));
  if (!prompt_done_ && (!event.tokens.empty() || event.finished)) EmitPrompt(&delta);

  for (size_t i = 0; i < event.tokens.size() && !finished(); ++i) {
    const bool ends =
        event.finished && event.reason == FinishReason::kStop && i + 1 == event.tokens.size();
    ++num_generated_;
    if (want_ids_) delta.token_ids.push_back(event.tokens[i]);
    if (ends && !include_stop_) break;  // the id that ended the sequence is not text
    PushToken(event.tokens[i], i < event.logprobs.size() ? &event.logprobs[i] : nullptr, &delta);
  }
  if (event.finished && !finished()) {
    finish_ = event.reason;
    Flush(&delta);
  }
  delta.finish = finish_;
  return delta;
}

void ChoiceAssembler::PushToken(int32_t id, const TokenLogprob* logprob, ChoiceDelta* delta) {
  const std::string piece = detokenizer_.Push(id);
  raw_bytes_ += piece.size();
  if (want_logprobs_) {
    OutputToken token{.id = id, .text = piece, .top = {}};
    if (logprob != nullptr) {
      token.scored = true;
      token.logprob = logprob->logprob;
      token.top = logprob->top;
    }
    held_.push_back({std::move(token), raw_bytes_});
  }
  if (num_generated_ <
      min_tokens_) {  // too early to stop: the text cannot be part of a stop string
    delta->text += piece;
    sent_bytes_ += piece.size();
  } else {
    StopMatcher::Output out = stops_.Push(piece);
    sent_bytes_ += out.text.size();
    delta->text += out.text;
    if (out.match) {
      finish_ = FinishReason::kStop;
      stopped_by_string_ = true;
    }
  }
  ReleaseTokens(delta);
}

void ChoiceAssembler::Flush(ChoiceDelta* delta) {
  const std::string tail = detokenizer_.Flush();
  raw_bytes_ += tail.size();
  if (!tail.empty() && !held_.empty()) {
    held_.back().token.text += tail;
    held_.back().end = raw_bytes_;
  }
  StopMatcher::Output out = stops_.Push(tail);
  if (out.match) {
    finish_ = FinishReason::kStop;
  } else {
    out.text += stops_.Flush();
  }
  sent_bytes_ += out.text.size();
  delta->text += out.text;
  ReleaseTokens(delta);
}

// Hands out the tokens whose text is sent; at the end also the one that a stop string cut. Tokens
// behind the cut are dropped: they are not part of the answer.
void ChoiceAssembler::ReleaseTokens(ChoiceDelta* delta) {
  while (!held_.empty() && held_.front().end <= sent_bytes_) {
    // The last token may still get the replacement character of an incomplete one.
    if (!finished() && held_.size() == 1 && detokenizer_.held_bytes() > 0) return;
    delta->tokens.push_back(std::move(held_.front().token));
    held_.pop_front();
  }
  if (!finished() || held_.empty()) return;
  HeldToken& cut = held_.front();
  const size_t begin = cut.end - cut.token.text.size();
  if (begin < sent_bytes_) {
    cut.token.text.resize(sent_bytes_ - begin);
    cut.token.whole = false;
    delta->tokens.push_back(std::move(cut.token));
  }
  held_.clear();
}

}  // namespace switchyard
