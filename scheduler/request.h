// Request: what the server hands to the scheduler, and the events that come back. A Request is
// immutable after Submit. An accepted request ends exactly once: every choice gets one event with
// `finished`, unless the server cancelled it.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/step_plan.h"

namespace switchyard {

using RequestId = uint64_t;  // never reused

enum class FinishReason : uint8_t { kNone, kStop, kLength, kCancelled, kError };

// Everything that happened to one choice in one step. `tokens` are in order; an id that ended the
// sequence (eos or a stop id) is delivered with `finished` and reason kStop, and the server decides
// whether its text is shown.
struct ChoiceEvent {
  RequestId request = 0;
  int32_t choice = 0;
  std::vector<int32_t> tokens;
  std::vector<TokenLogprob> logprobs;  // parallel to tokens when asked for
  std::vector<TokenLogprob>
      prompt_logprobs;        // of prompt positions 1…; delivered before or with the first token
  int32_t cached_tokens = 0;  // prompt tokens served from the prefix cache
  bool finished = false;
  FinishReason reason = FinishReason::kNone;
  absl::Status error;  // when reason is kError
  // Monotonic times of this choice, for metrics; set from the first event on.
  std::chrono::steady_clock::time_point first_scheduled;
  std::chrono::steady_clock::time_point prefill_done;
};

// Called on the scheduler's thread with all events of one step for one request; must only enqueue,
// never block.
using EventSink = std::function<void(std::vector<ChoiceEvent>)>;

struct Request {
  // At least one id, each below vocab_size; at most max_model_len - 1 of them, or max_model_len
  // when max_tokens is 0.
  std::vector<int32_t> prompt;
  std::vector<SamplingParams> choices;  // one per choice (n of them), seeds set
  int32_t max_tokens = 0;               // ≥ 0; 0 only computes the prompt (echo)
  std::vector<int32_t> stop_token_ids;  // eos ids included unless ignore_eos
  std::string cache_salt;               // part of the prefix cache's key
  std::chrono::steady_clock::time_point arrival;
  EventSink sink;
};

}  // namespace switchyard
