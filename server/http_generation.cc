#include "server/http_generation.h"

#include <iterator>
#include <utility>

#include "server/api_error.h"

namespace switchyard {
namespace {

class WholeAnswer : public GenerationConsumer {
 public:
  WholeAnswer(AnswerIdentity identity, size_t num_choices, HttpHeaders headers,
              std::shared_ptr<HttpExchange> exchange)
      : identity_(std::move(identity)),
        headers_(std::move(headers)),
        exchange_(std::move(exchange)),
        choices_(num_choices) {}

  void OnAccepted() override {}

  void OnDeltas(std::vector<ChoiceDelta> deltas) override {
    for (ChoiceDelta& delta : deltas) {
      WholeChoice& choice = choices_[static_cast<size_t>(delta.index)];
      choice.text += delta.text;
      std::move(delta.tokens.begin(), delta.tokens.end(), std::back_inserter(choice.tokens));
      choice.token_ids.insert(choice.token_ids.end(), delta.token_ids.begin(),
                              delta.token_ids.end());
      if (delta.finish != FinishReason::kNone) choice.finish = delta.finish;
    }
  }

  void OnDone(const Usage& usage) override {
    exchange_->Respond({.status = 200,
                        .content_type = "application/json",
                        .headers = headers_,
                        .body = FormatWhole(identity_, choices_, usage)});
  }

  void OnError(const absl::Status& status) override {
    exchange_->Respond(ErrorResponse(status, headers_));
  }

 private:
  const AnswerIdentity identity_;
  const HttpHeaders headers_;
  const std::shared_ptr<HttpExchange> exchange_;
  std::vector<WholeChoice> choices_;
};

class StreamedAnswer : public GenerationConsumer {
 public:
  StreamedAnswer(AnswerIdentity identity, bool usage_asked, HttpHeaders headers,
                 std::shared_ptr<HttpExchange> exchange)
      : format_(std::move(identity), usage_asked),
        usage_asked_(usage_asked),
        headers_(std::move(headers)),
        exchange_(std::move(exchange)) {}

  void OnAccepted() override {
    HttpHeaders headers = headers_;
    headers.emplace_back("Cache-Control", "no-cache");
    headers.emplace_back("X-Accel-Buffering", "no");
    exchange_->BeginStream(std::move(headers));
  }

  void OnDeltas(std::vector<ChoiceDelta> deltas) override {
    std::string events;
    for (const ChoiceDelta& delta : deltas) events += format_.Delta(delta);
    if (!events.empty()) exchange_->Write(std::move(events));
  }

  void OnDone(const Usage& usage) override {
    std::string events = usage_asked_ ? format_.UsageChunk(usage) : std::string();
    events += StreamFormat::Done();
    exchange_->Write(std::move(events));
    exchange_->EndStream();
  }

  void OnError(const absl::Status& status) override {
    exchange_->Write(StreamFormat::Error(status) + std::string(StreamFormat::Done()));
    exchange_->EndStream();
  }

 private:
  StreamFormat format_;
  const bool usage_asked_;
  const HttpHeaders headers_;
  const std::shared_ptr<HttpExchange> exchange_;
};

}  // namespace

std::unique_ptr<GenerationConsumer> NewWholeAnswer(AnswerIdentity identity, size_t num_choices,
                                                   HttpHeaders headers,
                                                   std::shared_ptr<HttpExchange> exchange) {
  return std::make_unique<WholeAnswer>(std::move(identity), num_choices, std::move(headers),
                                       std::move(exchange));
}

std::unique_ptr<GenerationConsumer> NewStreamedAnswer(AnswerIdentity identity, bool usage_asked,
                                                      HttpHeaders headers,
                                                      std::shared_ptr<HttpExchange> exchange) {
  return std::make_unique<StreamedAnswer>(std::move(identity), usage_asked, std::move(headers),
                                          std::move(exchange));
}

HttpResponse ErrorResponse(const absl::Status& status, HttpHeaders headers) {
  const ApiError error = ErrorFromStatus(status);
  if (error.http_status == 429 || error.http_status == 503)
    headers.emplace_back("Retry-After", "1");
  if (error.http_status == 401) headers.emplace_back("WWW-Authenticate", "Bearer");
  return {.status = error.http_status,
          .content_type = "application/json",
          .headers = std::move(headers),
          .body = ErrorBody(error)};
}

}  // namespace switchyard
