#include "server/http_routes.h"

#include <random>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/api_error.h"
#include "server/cluster_json.h"
#include "server/http_generation.h"
#include "server/json_writer.h"
#include "server/openai_format.h"
#include "server/request_parser.h"

namespace switchyard {
namespace {

constexpr std::string_view kModelPrefix = "/models/";

std::string RandomId(absl::string_view prefix) {
  thread_local std::mt19937_64 random{std::random_device{}()};
  return absl::StrCat(prefix, absl::Hex(random(), absl::kZeroPad16),
                      absl::Hex(random() >> 32, absl::kZeroPad8));
}

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  const char lower = absl::ascii_tolower(static_cast<unsigned char>(c));
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

// Sequences that are no escapes stay as they are.
std::string PercentDecode(absl::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && HexValue(text[i + 1]) >= 0 &&
        HexValue(text[i + 2]) >= 0) {
      out.push_back(static_cast<char>(HexValue(text[i + 1]) * 16 + HexValue(text[i + 2])));
      i += 2;
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

// Valid as JSON text: an id is shown in error messages.
std::string Printable(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) >= 0x7F) c = '?';
  }
  return text.substr(0, 200);
}

bool IsJson(absl::string_view content_type) {
  const absl::string_view type =
      absl::StripAsciiWhitespace(content_type.substr(0, content_type.find(';')));
  return type.empty() || absl::EqualsIgnoreCase(type, "application/json");
}

void WriteModel(const Engine& engine, int64_t created, JsonWriter& json) {
  json.BeginObject()
      .Member("id", engine.model.name)
      .Member("object", "model")
      .Member("created", created);
  json.Member("owned_by", "switchyard").Member("root", engine.model.name).Key("parent").Null();
  json.Member("max_model_len", int64_t{engine.model.max_model_len}).EndObject();
}

}  // namespace

struct HttpRoutes::Call {
  HttpRequest request;
  std::string path;  // without /v1
  HttpHeaders headers;
  std::shared_ptr<HttpExchange> exchange;

  void Respond(std::string body) const {
    exchange->Respond({.status = 200,
                       .content_type = "application/json",
                       .headers = headers,
                       .body = std::move(body)});
  }
  void Fail(const absl::Status& status) const { exchange->Respond(ErrorResponse(status, headers)); }
  // For statuses that only HTTP knows (405, 415).
  void Refuse(int status, const std::string& message, HttpHeaders more = {}) const {
    HttpHeaders all = headers;
    all.insert(all.end(), more.begin(), more.end());
    exchange->Respond({.status = status,
                       .content_type = "application/json",
                       .headers = std::move(all),
                       .body = ErrorBody(status, message)});
  }
};

const HttpRoutes::Route HttpRoutes::kRoutes[] = {
    {"/chat/completions", "POST", &HttpRoutes::Chat},
    {"/completions", "POST", &HttpRoutes::Complete},
    {"/tokenize", "POST", &HttpRoutes::Tokenize},
    {"/detokenize", "POST", &HttpRoutes::Detokenize},
    {"/models", "GET", &HttpRoutes::ListModels},
    {kModelPrefix, "GET", &HttpRoutes::OneModel},
    {"/health", "GET", &HttpRoutes::Health},
    {"/version", "GET", &HttpRoutes::Version},
    {"/metrics", "GET", &HttpRoutes::ShowMetrics},
    {"/admin/cluster", "GET", &HttpRoutes::ShowCluster},
};

void HttpRoutes::Handle(HttpRequest request, const std::shared_ptr<HttpExchange>& exchange) {
  Call call{.request = std::move(request), .path = {}, .headers = {}, .exchange = exchange};
  call.headers = {{"Access-Control-Allow-Origin", "*"},
                  {"Access-Control-Expose-Headers", "X-Request-Id, Retry-After"}};
  call.path =
      absl::StartsWith(call.request.path, "/v1/") ? call.request.path.substr(3) : call.request.path;

  if (call.request.method == "OPTIONS") {
    call.headers.insert(call.headers.end(), {{"Access-Control-Allow-Methods", "GET, POST, OPTIONS"},
                                             {"Access-Control-Allow-Headers", "*, Authorization"},
                                             {"Access-Control-Max-Age", "86400"}});
    exchange->Respond(
        {.status = 204, .content_type = "", .headers = std::move(call.headers), .body = ""});
    return;
  }
  if (call.path != "/health") {
    if (auto status = front_end_->Authorize(call.request.authorization); !status.ok())
      return call.Fail(status);
  }
  for (const Route& route : kRoutes) {
    const bool found = route.path == kModelPrefix ? call.path.size() > kModelPrefix.size() &&
                                                        call.path.rfind(kModelPrefix, 0) == 0
                                                  : call.path == route.path;
    if (found) return Dispatch(std::make_shared<const Call>(std::move(call)), route);
  }
  call.Fail(
      absl::NotFoundError(absl::StrCat("there is nothing at ", Printable(call.request.path))));
}

void HttpRoutes::Dispatch(const std::shared_ptr<const Call>& shared, const Route& route) {
  const Call& call = *shared;
  const std::string& method = call.request.method;
  const bool is_get = route.method == "GET";
  if (method != route.method && !(is_get && method == "HEAD")) {
    call.Refuse(405,
                absl::StrCat(Printable(call.path), " takes ", std::string(route.method), ", not ",
                             Printable(method)),
                {{"Allow", is_get ? "GET, HEAD, OPTIONS" : "POST, OPTIONS"}});
    return;
  }
  if (is_get) return (this->*route.handler)(call);
  if (!IsJson(call.request.content_type)) {
    call.Refuse(415, absl::StrCat("Content-Type must be application/json, not ",
                                  Printable(call.request.content_type)));
    return;
  }
  front_end_->pool().Post([this, shared, handler = route.handler] { (this->*handler)(*shared); });
}

void HttpRoutes::Complete(const Call& call) {
  Generate(call, ParseCompletionRequest(call.request.body));
}
void HttpRoutes::Chat(const Call& call) { Generate(call, ParseChatRequest(call.request.body)); }

void HttpRoutes::Generate(const Call& call, absl::StatusOr<GenerationRequest> request) {
  // A server that is not ready says so first: a client that retries then learns of its mistakes.
  const auto engine = front_end_->EngineForWork();
  if (!engine.ok()) return call.Fail(engine.status());
  if (!request.ok()) return call.Fail(request.status());
  request->arrival = call.request.arrival;
  AnswerIdentity identity{.chat = request->chat,
                          .id = RandomId(request->chat ? "chatcmpl-" : "cmpl-"),
                          .created = std::chrono::duration_cast<std::chrono::seconds>(
                                         std::chrono::system_clock::now().time_since_epoch())
                                         .count(),
                          .model = (*engine)->model.name,
                          .logprobs = request->logprobs >= 0,
                          .num_top_logprobs = request->logprobs,
                          .token_ids = request->return_token_ids,
                          .tokenizer = (*engine)->tokenizer};
  const size_t num_choices =
      (request->chat ? 1 : request->prompts.size()) * static_cast<size_t>(request->n);
  auto consumer = request->stream ? NewStreamedAnswer(std::move(identity), request->include_usage,
                                                      call.headers, call.exchange)
                                  : NewWholeAnswer(std::move(identity), num_choices, call.headers,
                                                   call.exchange);
  const auto generation = front_end_->Generate(*request, std::move(consumer));
  if (!generation.ok()) return call.Fail(generation.status());
  call.exchange->OnDisconnect([weak = std::weak_ptr<Generation>(*generation)] {
    if (const auto running = weak.lock()) running->Cancel();
  });
}

void HttpRoutes::Tokenize(const Call& call) {
  const auto engine = front_end_->EngineForWork();
  if (!engine.ok()) return call.Fail(engine.status());
  const auto request = ParseTokenizeRequest(call.request.body);
  if (!request.ok()) return call.Fail(request.status());
  if (auto status = CheckModel(request->model, **engine); !status.ok()) return call.Fail(status);
  const auto ids = request->chat
                       ? TokenizeChat(request->conversation, **engine)
                       : TokenizePrompt(request->prompt, request->add_special_tokens, **engine);
  if (!ids.ok()) return call.Fail(ids.status());
  JsonWriter json;
  json.BeginObject().Member("count", static_cast<int64_t>(ids->size()));
  json.Member("max_model_len", int64_t{(*engine)->model.max_model_len}).Key("tokens").BeginArray();
  for (const int32_t id : *ids) json.Int(id);
  json.EndArray();
  if (request->return_token_strs) {
    json.Key("token_strs").BeginArray();
    for (const int32_t id : *ids) json.String((*engine)->tokenizer->TokenText(id));
    json.EndArray();
  }
  json.EndObject();
  call.Respond(json.Take());
}

void HttpRoutes::Detokenize(const Call& call) {
  const auto engine = front_end_->EngineForWork();
  if (!engine.ok()) return call.Fail(engine.status());
  const auto request = ParseDetokenizeRequest(call.request.body);
  if (!request.ok()) return call.Fail(request.status());
  if (auto status = CheckModel(request->model, **engine); !status.ok()) return call.Fail(status);
  for (const int32_t id : request->tokens) {
    if (id < 0 || id >= (*engine)->model.vocab_size) {
      return call.Fail(
          ParamError("tokens", absl::StrCat("token id ", id, " is outside the vocabulary of ",
                                            (*engine)->model.vocab_size, " tokens")));
    }
  }
  JsonWriter json;
  json.BeginObject().Member("prompt",
                            (*engine)->tokenizer->Decode(request->tokens, {.skip_special = false}));
  json.EndObject();
  call.Respond(json.Take());
}

void HttpRoutes::ListModels(const Call& call) {
  const auto engine = front_end_->engine();
  if (engine == nullptr) return call.Fail(front_end_->Loading());
  JsonWriter json;
  json.BeginObject().Member("object", "list").Key("data").BeginArray();
  WriteModel(*engine, started_unix_seconds_, json);
  json.EndArray().EndObject();
  call.Respond(json.Take());
}

void HttpRoutes::OneModel(const Call& call) {
  const auto engine = front_end_->engine();
  if (engine == nullptr) return call.Fail(front_end_->Loading());
  const std::string id = PercentDecode(call.path.substr(kModelPrefix.size()));
  if (id != engine->model.name) {
    return call.Fail(WithErrorCode(
        absl::NotFoundError(absl::StrCat("model '", Printable(id), "' does not exist")),
        "model_not_found"));
  }
  JsonWriter json;
  WriteModel(*engine, started_unix_seconds_, json);
  call.Respond(json.Take());
}

void HttpRoutes::Health(const Call& call) {
  const absl::Status status = front_end_->Health();
  if (!status.ok()) return call.Fail(status);
  JsonWriter json;
  json.BeginObject().Member("status", "ok").EndObject();
  call.Respond(json.Take());
}

void HttpRoutes::Version(const Call& call) {
  JsonWriter json;
  json.BeginObject().Member("version", SWITCHYARD_VERSION).EndObject();
  call.Respond(json.Take());
}

void HttpRoutes::ShowCluster(const Call& call) {
  const std::optional<ClusterSnapshot> cluster = front_end_->cluster();
  if (!cluster) return call.Fail(front_end_->Loading());
  call.Respond(ClusterJson(*cluster));
}

void HttpRoutes::ShowMetrics(const Call& call) {
  front_end_->pool().Post([this, call] {
    call.exchange->Respond({.status = 200,
                            .content_type = "text/plain; version=0.0.4; charset=utf-8",
                            .headers = call.headers,
                            .body = front_end_->SerializeMetrics()});
  });
}

}  // namespace switchyard
