#include "server/api_error.h"

#include "absl/strings/cord.h"
#include "server/json_writer.h"

namespace switchyard {
namespace {

constexpr std::string_view kParam = "switchyard/param";
constexpr std::string_view kCode = "switchyard/code";

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

std::string Payload(const absl::Status& status, std::string_view url) {
  const auto cord = status.GetPayload(View(url));
  return cord ? std::string(*cord) : std::string();
}

int HttpStatus(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kFailedPrecondition:
      return 400;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kPermissionDenied:
      return 403;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kResourceExhausted:
      return 429;
    case absl::StatusCode::kUnavailable:
      return 503;
    default:
      return 500;
  }
}

std::string_view ErrorType(int http_status) {
  switch (http_status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    case 503:
      return "unavailable_error";
    default:
      return http_status >= 500 ? "server_error" : "invalid_request_error";
  }
}

void NullableMember(std::string_view key, std::string_view value, JsonWriter& json) {
  json.Key(key);
  if (value.empty()) {
    json.Null();
  } else {
    json.String(value);
  }
}

}  // namespace

absl::Status ParamError(std::string_view param, std::string_view message) {
  absl::Status status = absl::InvalidArgumentError(View(message));
  status.SetPayload(View(kParam), absl::Cord(View(param)));
  return status;
}

absl::Status WithErrorCode(absl::Status status, std::string_view code) {
  status.SetPayload(View(kCode), absl::Cord(View(code)));
  return status;
}

ApiError ErrorFromStatus(const absl::Status& status) {
  return {.http_status = HttpStatus(status.code()),
          .message = std::string(status.message()),
          .param = Payload(status, kParam),
          .code = Payload(status, kCode)};
}

std::string ErrorBody(const ApiError& error) {
  JsonWriter json;
  json.BeginObject().Key("error").BeginObject();
  json.Member("message", error.message).Member("type", ErrorType(error.http_status));
  NullableMember("param", error.param, json);
  NullableMember("code", error.code, json);
  json.EndObject().EndObject();
  return json.Take();
}

std::string ErrorBody(int http_status, std::string_view message) {
  return ErrorBody(
      {.http_status = http_status, .message = std::string(message), .param = {}, .code = {}});
}

}  // namespace switchyard
