// From a request's JSON body to plain structs. Pure functions: any thread, but heavy enough for the
// task pool. No input can crash them (request_parser_fuzz); every error is kInvalidArgument and
// names the field. Unknown fields are accepted.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/generation_request.h"

namespace switchyard {

constexpr int kMaxJsonDepth = 64;

// The bodies of POST /v1/completions and /v1/chat/completions. Types and ranges are checked;
// nothing of the model.
absl::StatusOr<GenerationRequest> ParseCompletionRequest(const std::string& body);
absl::StatusOr<GenerationRequest> ParseChatRequest(const std::string& body);

struct TokenizeRequest {
  std::string model;
  bool chat = false;
  PromptInput prompt;       // when !chat
  ChatPrompt conversation;  // when chat
  bool add_special_tokens = true;
  bool return_token_strs = false;
};

struct DetokenizeRequest {
  std::string model;
  std::vector<int32_t> tokens;
};

absl::StatusOr<TokenizeRequest> ParseTokenizeRequest(const std::string& body);
absl::StatusOr<DetokenizeRequest> ParseDetokenizeRequest(const std::string& body);

}  // namespace switchyard
