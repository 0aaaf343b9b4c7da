// GenerationRequest: what a client asked for, whatever the protocol: the HTTP body parser and the
// gRPC service fill it, Validate checks its ranges, and Prepare turns it into scheduler Requests.
// Plain values; no thread of their own.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "scheduler/request.h"
#include "server/engine.h"
#include "server/text/chat_template.h"

namespace switchyard {

constexpr int32_t kMaxLogprobs = 20;     // alternatives per token
constexpr int32_t kMaxChoices = 128;     // n
constexpr int32_t kMaxSequences = 1024;  // prompts * n of one request
constexpr int32_t kMaxLogitBias = 4096;  // entries
constexpr int32_t kMaxStopStrings = 64;
constexpr int32_t kMaxStopTokenIds = 1024;
constexpr size_t kMaxStopBytes = 1024;  // of one stop string
constexpr int32_t kDefaultCompletionTokens = 16;

// Text or token ids.
struct PromptInput {
  std::string text;
  std::vector<int32_t> ids;
  bool is_text = true;
};

struct GenerationRequest {
  bool chat = false;
  std::string model;                 // empty: whatever is served
  std::vector<PromptInput> prompts;  // when !chat
  ChatPrompt conversation;           // when chat
  bool add_special_tokens =
      true;  // when !chat: bos and eos as the tokenizer's post-processor has them

  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<int32_t> top_k;
  std::optional<float> repetition_penalty;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  std::optional<int64_t> seed;
  std::optional<int32_t> max_tokens;
  int32_t min_tokens = 0;
  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  bool include_stop = false;
  bool ignore_eos = false;
  std::vector<std::pair<int32_t, float>> logit_bias;
  int32_t n = 1;
  int32_t logprobs = -1;  // -1: none; k: the chosen token's and the k best
  bool echo = false;

  std::string cache_salt;  // only requests with the same one share cached prompts; empty: none

  bool stream = false;
  bool include_usage = false;
  bool return_token_ids = false;
  std::chrono::steady_clock::time_point arrival;
};

// Checks all ranges that do not need a model. Errors name the parameter and the number.
absl::Status Validate(const GenerationRequest& request);

// kNotFound unless `model` is empty or the one that is served.
absl::Status CheckModel(const std::string& model, const Engine& engine);

// Applies the template, tokenizes, and checks against the model: one scheduler Request per prompt,
// without sinks. `seed` draws one when the client gave none. Heavy: task pool only.
absl::StatusOr<std::vector<Request>> Prepare(const GenerationRequest& request, const Engine& engine,
                                             const std::function<uint64_t()>& draw_seed);

// The prompt's tokens alone, as /tokenize shows them.
absl::StatusOr<std::vector<int32_t>> TokenizePrompt(const PromptInput& prompt,
                                                    bool add_special_tokens, const Engine& engine);
absl::StatusOr<std::vector<int32_t>> TokenizeChat(const ChatPrompt& conversation,
                                                  const Engine& engine);

}  // namespace switchyard
