// ApiError: what a client is told when a request fails, and the one mapping from absl::Status to
// HTTP. Plain values. Statuses carry the parameter at fault and OpenAI's error code as payloads, so
// that rooms below need not know of HTTP.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace switchyard {

struct ApiError {
  int http_status = 500;
  std::string message;
  std::string param;  // empty: null
  std::string code;   // empty: null
};

// kInvalidArgument with the name of the parameter at fault.
absl::Status ParamError(std::string_view param, std::string_view message);
// Adds OpenAI's machine-readable `code` ("context_length_exceeded", "model_not_found").
absl::Status WithErrorCode(absl::Status status, std::string_view code);

// REQUIRES: !status.ok().
ApiError ErrorFromStatus(const absl::Status& status);

// {"error":{"message":…,"type":…,"param":…,"code":…}}; the type follows from the HTTP status.
std::string ErrorBody(const ApiError& error);
// For statuses that only HTTP knows.
std::string ErrorBody(int http_status, std::string_view message);

}  // namespace switchyard
