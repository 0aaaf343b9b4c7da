#include "server/generation_request.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "server/api_error.h"

namespace switchyard {
namespace {

struct FloatRange {
  const char* name;
  float value;
  float low;
  float high;
  bool low_open = false;  // low itself is not allowed
};

absl::Status Check(const FloatRange& range) {
  const bool above = range.low_open ? range.value > range.low : range.value >= range.low;
  if (above && range.value <= range.high) return absl::OkStatus();  // NaN fails both
  const std::string bounds =
      std::isinf(range.high)
          ? absl::StrCat(range.low_open ? "greater than " : "at least ", range.low)
          : absl::StrCat("in ", range.low_open ? "(" : "[", range.low, ", ", range.high, "]");
  return ParamError(range.name,
                    absl::StrCat(range.name, " must be ", bounds, ", got ", range.value));
}

absl::Status CheckInt(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  if (high == INT32_MAX) {
    return ParamError(name, absl::StrCat(name, " must be at least ", low, ", got ", value));
  }
  return ParamError(name,
                    absl::StrCat(name, " must be between ", low, " and ", high, ", got ", value));
}

absl::Status ValidateStops(const GenerationRequest& request) {
  if (request.stop_token_ids.size() > static_cast<size_t>(kMaxStopTokenIds)) {
    return ParamError("stop_token_ids",
                      absl::StrCat("stop_token_ids has ", request.stop_token_ids.size(),
                                   " ids, the limit is ", kMaxStopTokenIds));
  }
  if (request.stop.size() > static_cast<size_t>(kMaxStopStrings)) {
    return ParamError("stop", absl::StrCat("stop has ", request.stop.size(),
                                           " strings, the limit is ", kMaxStopStrings));
  }
  for (const std::string& stop : request.stop) {
    if (stop.empty()) return ParamError("stop", "stop must not contain an empty string");
    if (stop.size() > kMaxStopBytes) {
      return ParamError("stop", absl::StrCat("a stop string has ", stop.size(),
                                             " bytes, the limit is ", kMaxStopBytes));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateSampling(const GenerationRequest& request) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const FloatRange& range :
       {FloatRange{"temperature", request.temperature.value_or(1), 0, infinity},
        FloatRange{"top_p", request.top_p.value_or(1), 0, 1, /*low_open=*/true},
        FloatRange{"min_p", request.min_p.value_or(0), 0, 1},
        FloatRange{"repetition_penalty", request.repetition_penalty.value_or(1), 0.01f, 100},
        FloatRange{"presence_penalty", request.presence_penalty, -2, 2},
        FloatRange{"frequency_penalty", request.frequency_penalty, -2, 2}}) {
    if (auto status = Check(range); !status.ok()) return status;
    if (std::isinf(range.value))
      return ParamError(range.name, absl::StrCat(range.name, " must be finite"));
  }
  if (request.logit_bias.size() > static_cast<size_t>(kMaxLogitBias)) {
    return ParamError("logit_bias", absl::StrCat("logit_bias has ", request.logit_bias.size(),
                                                 " entries, the limit is ", kMaxLogitBias));
  }
  for (const auto& [id, bias] : request.logit_bias) {
    if (!(bias >= -100 && bias <= 100)) {
      return ParamError("logit_bias", absl::StrCat("logit_bias of token ", id,
                                                   " must be in [-100, 100], got ", bias));
    }
  }
  return CheckInt("top_k", request.top_k.value_or(0), -1, INT32_MAX);
}

absl::Status CheckIds(const char* name, const std::vector<int32_t>& ids, int32_t vocab_size) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      return ParamError(
          name, absl::StrCat("token id ", id, " in ", name, " is outside the vocabulary of ",
                             vocab_size, " tokens"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckAgainstVocabulary(const GenerationRequest& request, const ModelInfo& model) {
  if (auto status = CheckIds("stop_token_ids", request.stop_token_ids, model.vocab_size);
      !status.ok())
    return status;
  std::vector<int32_t> biased;
  for (const auto& entry : request.logit_bias) biased.push_back(entry.first);
  return CheckIds("logit_bias", biased, model.vocab_size);
}

// How many tokens may follow a prompt of `num_prompt`.
absl::StatusOr<int32_t> ResolveMaxTokens(const GenerationRequest& request, int32_t num_prompt,
                                         int32_t max_model_len) {
  const char* input = request.chat ? "messages" : "prompt";
  if (num_prompt >= max_model_len) {
    return WithErrorCode(ParamError(input, absl::StrCat("this model's context is ", max_model_len,
                                                        " tokens, of which one must remain "
                                                        "for the answer; the prompt has ",
                                                        num_prompt)),
                         "context_length_exceeded");
  }
  const int32_t room = max_model_len - num_prompt;
  if (!request.max_tokens) return request.chat ? room : std::min(room, kDefaultCompletionTokens);
  if (*request.max_tokens > room) {
    return WithErrorCode(
        ParamError("max_tokens", absl::StrCat("this model's context is ", max_model_len,
                                              " tokens; the prompt has ", num_prompt,
                                              " and max_tokens asks for ", *request.max_tokens)),
        "context_length_exceeded");
  }
  return *request.max_tokens;
}

SamplingParams MakeSampling(const GenerationRequest& request, const Engine& engine) {
  const SamplingDefaults& defaults = engine.defaults;
  SamplingParams params;
  params.temperature = request.temperature.value_or(defaults.temperature.value_or(1.0f));
  params.top_p = request.top_p.value_or(defaults.top_p.value_or(1.0f));
  params.min_p = request.min_p.value_or(defaults.min_p.value_or(0.0f));
  params.top_k = std::max(0, request.top_k.value_or(defaults.top_k.value_or(0)));
  params.repetition_penalty =
      request.repetition_penalty.value_or(defaults.repetition_penalty.value_or(1.0f));
  params.presence_penalty = request.presence_penalty;
  params.frequency_penalty = request.frequency_penalty;
  params.logit_bias = request.logit_bias;
  params.min_tokens = request.min_tokens;
  params.num_logprobs = request.logprobs;
  params.num_prompt_logprobs = request.echo ? request.logprobs : -1;
  return params;
}

}  // namespace

absl::Status Validate(const GenerationRequest& request) {
  if (auto status = ValidateSampling(request); !status.ok()) return status;
  if (auto status = ValidateStops(request); !status.ok()) return status;
  if (auto status = CheckInt("n", request.n, 1, kMaxChoices); !status.ok()) return status;
  const int32_t fewest = request.echo ? 0 : 1;
  if (auto status = CheckInt("max_tokens", request.max_tokens.value_or(1), fewest, INT32_MAX);
      !status.ok()) {
    return status;
  }
  if (auto status = CheckInt("min_tokens", request.min_tokens, 0, INT32_MAX); !status.ok())
    return status;
  if (request.max_tokens && request.min_tokens > *request.max_tokens) {
    return ParamError("min_tokens",
                      absl::StrCat("min_tokens (", request.min_tokens, ") exceeds max_tokens (",
                                   *request.max_tokens, ")"));
  }
  if (request.logprobs > kMaxLogprobs) {
    const char* name = request.chat ? "top_logprobs" : "logprobs";
    return ParamError(
        name, absl::StrCat(name, " must be at most ", kMaxLogprobs, ", got ", request.logprobs));
  }
  if (request.chat) {
    if (request.conversation.add_generation_prompt && request.conversation.continue_final_message) {
      return ParamError("continue_final_message",
                        "add_generation_prompt and continue_final_message cannot both be true");
    }
    return absl::OkStatus();
  }
  if (request.prompts.empty()) return ParamError("prompt", "prompt must not be empty");
  const int64_t num_sequences = static_cast<int64_t>(request.prompts.size()) * request.n;
  if (num_sequences > kMaxSequences) {
    return ParamError("prompt",
                      absl::StrCat(request.prompts.size(), " prompts with n = ", request.n,
                                   " are more than the limit of ", kMaxSequences, " choices"));
  }
  return absl::OkStatus();
}

absl::Status CheckModel(const std::string& model, const Engine& engine) {
  if (model.empty() || model == engine.model.name) return absl::OkStatus();
  return WithErrorCode(
      absl::NotFoundError(absl::StrCat("model '", model, "' does not exist; this server has '",
                                       engine.model.name, "'")),
      "model_not_found");
}

absl::StatusOr<std::vector<int32_t>> TokenizePrompt(const PromptInput& prompt,
                                                    bool add_special_tokens, const Engine& engine) {
  std::vector<int32_t> ids;
  if (prompt.is_text) {
    // A raw prompt is the client's to compose, control tokens too; only in chats is the text
    // somebody else's.
    auto encoded = engine.tokenizer->Encode(
        prompt.text, {.add_special_tokens = add_special_tokens, .parse_special = true});
    if (!encoded.ok()) return ParamError("prompt", std::string(encoded.status().message()));
    ids = *std::move(encoded);
  } else {
    ids = prompt.ids;
    if (auto status = CheckIds("prompt", ids, engine.model.vocab_size); !status.ok()) return status;
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> TokenizeChat(const ChatPrompt& conversation,
                                                  const Engine& engine) {
  if (!engine.render_chat) {
    return ParamError(
        "messages",
        absl::StrCat("model '", engine.model.name,
                     "' has no chat template; use /v1/completions, or start the server with "
                     "--chat-template FILE"));
  }
  const auto segments = engine.render_chat(conversation);
  if (!segments.ok()) return ParamError("messages", std::string(segments.status().message()));
  auto ids = engine.tokenizer->Encode(*segments, {});
  if (!ids.ok()) return ParamError("messages", std::string(ids.status().message()));
  return ids;
}

absl::StatusOr<std::vector<Request>> Prepare(const GenerationRequest& request, const Engine& engine,
                                             const std::function<uint64_t()>& draw_seed) {
  if (auto status = CheckModel(request.model, engine); !status.ok()) return status;
  if (auto status = CheckAgainstVocabulary(request, engine.model); !status.ok()) return status;

  SamplingParams sampling = MakeSampling(request, engine);
  std::vector<int32_t> stop_ids = request.stop_token_ids;
  if (!request.ignore_eos) {
    stop_ids.insert(stop_ids.end(), engine.model.eos_token_ids.begin(),
                    engine.model.eos_token_ids.end());
  }
  std::sort(stop_ids.begin(), stop_ids.end());
  stop_ids.erase(std::unique(stop_ids.begin(), stop_ids.end()), stop_ids.end());
  if (request.min_tokens > 0 && stop_ids.size() >= static_cast<size_t>(engine.model.vocab_size)) {
    return ParamError("stop_token_ids", absl::StrCat("every one of the ", engine.model.vocab_size,
                                                     " tokens would end the output before its "
                                                     "min_tokens (",
                                                     request.min_tokens, ")"));
  }

  std::vector<Request> prepared;
  const size_t num_prompts = request.chat ? 1 : request.prompts.size();
  for (size_t i = 0; i < num_prompts; ++i) {
    auto ids = request.chat
                   ? TokenizeChat(request.conversation, engine)
                   : TokenizePrompt(request.prompts[i], request.add_special_tokens, engine);
    if (!ids.ok()) return ids.status();
    if (ids->empty()) {
      return ParamError(request.chat ? "messages" : "prompt",
                        "the prompt is empty: it has no tokens");
    }
    const auto max_tokens =
        ResolveMaxTokens(request, static_cast<int32_t>(ids->size()), engine.model.max_model_len);
    if (!max_tokens.ok()) return max_tokens.status();
    if (request.min_tokens > *max_tokens) {
      return ParamError("min_tokens",
                        absl::StrCat("min_tokens (", request.min_tokens, ") exceeds the ",
                                     *max_tokens, " tokens that may follow the prompt"));
    }
    Request& one = prepared.emplace_back();
    one.prompt = *std::move(ids);
    one.max_tokens = *max_tokens;
    one.stop_token_ids = stop_ids;
    one.cache_salt = request.cache_salt;
    one.arrival = request.arrival;
    sampling.seed = request.seed ? static_cast<uint64_t>(*request.seed) : draw_seed();
    for (int32_t choice = 0; choice < request.n; ++choice) {
      sampling.choice = static_cast<uint32_t>(choice);
      one.choices.push_back(sampling);
    }
  }
  return prepared;
}

}  // namespace switchyard
