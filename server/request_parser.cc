#include "server/request_parser.h"

#include <charconv>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "server/api_error.h"
#include "server/json_object.h"

namespace switchyard {
namespace {

using simdjson::dom::array;
using simdjson::dom::element;

// "stop": a string or a list of strings.
void ReadStop(JsonObject& json, std::vector<std::string>* stop) {
  element value;
  if (!json.Find("stop", &value)) return;
  std::string_view text;
  if (!value.get(text)) {
    stop->emplace_back(text);
    return;
  }
  array list;
  if (value.get(list)) {
    json.Fail(WrongType("stop", "a string or a list of strings", value));
    return;
  }
  for (const element item : list) {
    if (item.get(text)) {
      json.Fail(WrongType("stop", "a string or a list of strings", item));
      return;
    }
    stop->emplace_back(text);
  }
}

// "logit_bias": {"token id": bias}.
void ReadLogitBias(JsonObject& json, std::vector<std::pair<int32_t, float>>* logit_bias) {
  element value;
  if (!json.Find("logit_bias", &value)) return;
  simdjson::dom::object object;
  if (value.get(object)) {
    json.Fail(WrongType("logit_bias", "an object from token ids to numbers", value));
    return;
  }
  for (const auto& [key, item] : object) {
    int32_t id = 0;
    const auto parsed = std::from_chars(key.data(), key.data() + key.size(), id);
    if (parsed.ec != std::errc() || parsed.ptr != key.data() + key.size()) {
      json.Fail(
          ParamError("logit_bias",
                     absl::StrCat("logit_bias has the key '",
                                  absl::string_view(key.data(), std::min<size_t>(key.size(), 40)),
                                  "', which is no token id")));
      return;
    }
    double bias = 0;
    if (!item.is_number() || item.get(bias)) {
      json.Fail(WrongType("logit_bias", "an object from token ids to numbers", item));
      return;
    }
    logit_bias->emplace_back(id, static_cast<float>(bias));
  }
}

void ReadResponseFormat(JsonObject& json) {
  element value;
  if (!json.Find("response_format", &value)) return;
  simdjson::dom::object object;
  std::string_view type;
  if (value.get(object) || object.at_key("type").get(type)) {
    json.Fail(ParamError("response_format", "response_format must be an object with a type"));
  } else if (type != "text") {
    json.Fail(ParamError(
        "response_format",
        absl::StrCat("response_format type '", absl::string_view(type.data(), type.size()),
                     "' is not supported; 'text' is")));
  }
}

void ReadStreamOptions(JsonObject& json, GenerationRequest* request) {
  json.Read("stream", &request->stream);
  element value;
  if (!json.Find("stream_options", &value)) return;
  simdjson::dom::object object;
  if (value.get(object)) {
    json.Fail(WrongType("stream_options", "an object", value));
    return;
  }
  if (!request->stream) {
    json.Fail(ParamError("stream_options", "stream_options is only allowed with stream: true"));
    return;
  }
  JsonObject options(object);
  options.Read("include_usage", &request->include_usage);
  json.Fail(options.status());
}

void ReadCacheSalt(JsonObject& json, std::string* salt) {
  element value;
  if (!json.Find("cache_salt", &value)) return;
  json.Read("cache_salt", salt);
  if (json.status().ok() && salt->empty())
    json.Fail(ParamError("cache_salt", "cache_salt must not be empty"));
}

// What completions and chats have in common.
void ReadCommon(JsonObject& json, GenerationRequest* request) {
  json.Read("model", &request->model);
  json.Read("temperature", &request->temperature);
  json.Read("top_p", &request->top_p);
  json.Read("min_p", &request->min_p);
  json.Read("top_k", &request->top_k);
  json.Read("repetition_penalty", &request->repetition_penalty);
  json.Read("presence_penalty", &request->presence_penalty);
  json.Read("frequency_penalty", &request->frequency_penalty);
  json.Read("seed", &request->seed);
  json.Read("max_tokens", &request->max_tokens);
  json.Read("max_completion_tokens", &request->max_tokens);
  json.Read("min_tokens", &request->min_tokens);
  json.Read("stop_token_ids", &request->stop_token_ids);
  json.Read("include_stop_str_in_output", &request->include_stop);
  json.Read("ignore_eos", &request->ignore_eos);
  json.Read("n", &request->n);
  json.Read("return_token_ids", &request->return_token_ids);
  std::string user;
  json.Read("user", &user);
  ReadCacheSalt(json, &request->cache_salt);
  ReadStop(json, &request->stop);
  ReadLogitBias(json, &request->logit_bias);
  ReadResponseFormat(json);
  ReadStreamOptions(json, request);
}

// "prompt": a string, a list of strings, of token ids, or of lists of token ids.
absl::Status ReadPrompts(element value, std::vector<PromptInput>* prompts) {
  static constexpr std::string_view kExpected =
      "a string, a list of strings, or one or more lists of token ids";
  std::string_view text;
  if (!value.get(text)) {
    prompts->push_back({.text = std::string(text), .ids = {}});
  } else {
    array list;
    if (value.get(list)) return WrongType("prompt", kExpected, value);
    if (list.begin() != list.end() && (*list.begin()).is_number()) {
      PromptInput& prompt = prompts->emplace_back();
      prompt.is_text = false;
      if (auto status = ReadTokenIds("prompt", list, &prompt.ids); !status.ok()) return status;
    } else {
      for (const element item : list) {
        PromptInput& prompt = prompts->emplace_back();
        array ids;
        if (!item.get(text)) {
          prompt.text = std::string(text);
        } else if (!item.get(ids)) {
          prompt.is_text = false;
          if (auto status = ReadTokenIds("prompt", ids, &prompt.ids); !status.ok()) return status;
        } else {
          return WrongType("prompt", kExpected, item);
        }
      }
    }
  }
  for (const PromptInput& prompt : *prompts) {
    if (prompt.is_text ? prompt.text.empty() : prompt.ids.empty()) {
      return ParamError("prompt", "prompt must not be empty");
    }
  }
  return prompts->empty() ? ParamError("prompt", "prompt must not be empty") : absl::OkStatus();
}

absl::Status CheckContent(std::string_view where, element message) {
  element content;
  if (message.at_key("content").get(content) || content.is_null() || content.is_string())
    return absl::OkStatus();
  array parts;
  if (content.get(parts)) return WrongType(where, "a string or a list of text parts", content);
  for (const element part : parts) {
    std::string_view type;
    std::string_view text;
    if (part.at_key("type").get(type)) {
      return ParamError("messages", absl::StrCat(absl::string_view(where.data(), where.size()),
                                                 " has a part without a type"));
    }
    if (type != "text") {
      return ParamError(
          "messages",
          absl::StrCat(absl::string_view(where.data(), where.size()), " has a part of type '",
                       absl::string_view(type.data(), type.size()), "'; only 'text' is supported"));
    }
    if (part.at_key("text").get(text)) {
      return ParamError("messages", absl::StrCat(absl::string_view(where.data(), where.size()),
                                                 " has a text part whose text is no string"));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadMessages(element value, nlohmann::ordered_json* messages) {
  array list;
  if (value.get(list)) return WrongType("messages", "a list of messages", value);
  if (list.begin() == list.end()) return ParamError("messages", "messages must not be empty");
  size_t i = 0;
  for (const element message : list) {
    const std::string where = absl::StrCat("messages[", i++, "]");
    if (!message.is_object()) {
      return ParamError("messages", absl::StrCat(where, " must be an object, not ",
                                                 std::string(JsonTypeName(message))));
    }
    std::string_view role;
    if (message.at_key("role").get(role)) {
      return ParamError("messages", absl::StrCat(where, ".role must be a string"));
    }
    if (auto status = CheckContent(where + ".content", message); !status.ok()) return status;
  }
  *messages = ToNlohmann(value);
  return absl::OkStatus();
}

void ReadConversation(JsonObject& json, ChatPrompt* chat) {
  element value;
  if (!json.Find("messages", &value)) {
    json.Fail(ParamError("messages", "messages is required and must be a list of messages"));
    return;
  }
  json.Fail(ReadMessages(value, &chat->messages));
  if (json.Find("tools", &value)) {
    if (!value.is_array()) json.Fail(WrongType("tools", "a list", value));
    chat->tools = ToNlohmann(value);
  }
  if (json.Find("chat_template_kwargs", &value)) {
    if (!value.is_object()) json.Fail(WrongType("chat_template_kwargs", "an object", value));
    chat->kwargs = ToNlohmann(value);
  }
  json.Read("continue_final_message", &chat->continue_final_message);
  json.Read("add_generation_prompt", &chat->add_generation_prompt);
  chat->now_unix_seconds = std::time(nullptr);
}

absl::StatusOr<GenerationRequest> Checked(const JsonObject& json, GenerationRequest request) {
  if (!json.status().ok()) return json.status();
  if (auto status = Validate(request); !status.ok()) return status;
  return request;
}

}  // namespace

absl::StatusOr<GenerationRequest> ParseCompletionRequest(const std::string& body) {
  simdjson::dom::parser parser;
  element root;
  if (auto status = ParseJsonBody(body, kMaxJsonDepth, &parser, &root); !status.ok()) return status;
  JsonObject json{simdjson::dom::object(root)};
  GenerationRequest request;
  element value;
  if (!json.Find("prompt", &value)) return ParamError("prompt", "prompt is required");
  json.Fail(ReadPrompts(value, &request.prompts));
  ReadCommon(json, &request);
  json.Read("add_special_tokens", &request.add_special_tokens);
  json.Read("echo", &request.echo);
  std::optional<int32_t> logprobs;
  json.Read("logprobs", &logprobs);
  if (logprobs && *logprobs < 0) {
    json.Fail(ParamError("logprobs", absl::StrCat("logprobs must be at least 0, got ", *logprobs)));
  }
  request.logprobs = logprobs.value_or(-1);
  std::string suffix;
  json.Read("suffix", &suffix);
  if (!suffix.empty()) json.Fail(ParamError("suffix", "suffix is not supported"));
  return Checked(json, std::move(request));
}

absl::StatusOr<GenerationRequest> ParseChatRequest(const std::string& body) {
  simdjson::dom::parser parser;
  element root;
  if (auto status = ParseJsonBody(body, kMaxJsonDepth, &parser, &root); !status.ok()) return status;
  JsonObject json{simdjson::dom::object(root)};
  GenerationRequest request;
  request.chat = true;
  ReadConversation(json, &request.conversation);
  ReadCommon(json, &request);
  bool logprobs = false;
  std::optional<int32_t> top_logprobs;
  json.Read("logprobs", &logprobs);
  json.Read("top_logprobs", &top_logprobs);
  if (top_logprobs && *top_logprobs < 0) {
    json.Fail(ParamError("top_logprobs",
                         absl::StrCat("top_logprobs must be at least 0, got ", *top_logprobs)));
  }
  if (top_logprobs.value_or(0) > 0 && !logprobs) {
    json.Fail(ParamError("top_logprobs", "top_logprobs is only allowed with logprobs: true"));
  }
  if (logprobs) request.logprobs = top_logprobs.value_or(0);
  return Checked(json, std::move(request));
}

absl::StatusOr<TokenizeRequest> ParseTokenizeRequest(const std::string& body) {
  simdjson::dom::parser parser;
  element root;
  if (auto status = ParseJsonBody(body, kMaxJsonDepth, &parser, &root); !status.ok()) return status;
  JsonObject json{simdjson::dom::object(root)};
  TokenizeRequest request;
  element value;
  request.chat = json.Find("messages", &value);
  if (request.chat) {
    ReadConversation(json, &request.conversation);
    if (request.conversation.continue_final_message && request.conversation.add_generation_prompt) {
      json.Fail(ParamError("continue_final_message",
                           "add_generation_prompt and continue_final_message cannot both be true"));
    }
  } else if (!json.Find("prompt", &value)) {
    return ParamError("prompt", "prompt or messages is required");
  } else {
    json.Read("prompt", &request.prompt.text);
  }
  json.Read("model", &request.model);
  json.Read("add_special_tokens", &request.add_special_tokens);
  json.Read("return_token_strs", &request.return_token_strs);
  if (!json.status().ok()) return json.status();
  return request;
}

absl::StatusOr<DetokenizeRequest> ParseDetokenizeRequest(const std::string& body) {
  simdjson::dom::parser parser;
  element root;
  if (auto status = ParseJsonBody(body, kMaxJsonDepth, &parser, &root); !status.ok()) return status;
  JsonObject json{simdjson::dom::object(root)};
  DetokenizeRequest request;
  element value;
  if (!json.Find("tokens", &value)) return ParamError("tokens", "tokens is required");
  json.Read("tokens", &request.tokens);
  json.Read("model", &request.model);
  if (!json.status().ok()) return json.status();
  return request;
}

}  // namespace switchyard
