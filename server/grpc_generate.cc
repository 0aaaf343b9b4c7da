#include "server/grpc_generate.h"

#include <atomic>
#include <ctime>
#include <deque>
#include <map>
#include <memory>

#include "absl/strings/str_cat.h"
#include "server/api_error.h"

namespace switchyard {
namespace {

// A reader that lags further behind is dropped.
constexpr size_t kMaxPendingBytes = 1 << 20;

using Response = v1::GenerateResponse;

// Shared by the reactor, which gRPC owns until OnDone, and the consumer, which the Generation owns.
class Call {
 public:
  explicit Call(std::string request_id) : request_id_(std::move(request_id)) {}

  // The reactor's side. gRPC allows one write at a time and calls back when it is done.
  void Attach(grpc::ServerWriteReactor<Response>* reactor, grpc::CallbackServerContext* context) {
    MutexLock lock(mu_);
    reactor_ = reactor;
    context_ = context;
  }
  void OnWriteDone(bool ok) {
    MutexLock lock(mu_);
    writing_ = false;
    if (!pending_.empty()) {
      pending_bytes_ -= pending_.front().ByteSizeLong();
      pending_.pop_front();
    }
    if (!ok) pending_.clear();
    Advance();
  }
  // No use of the reactor after this.
  void Detach() {
    MutexLock lock(mu_);
    reactor_ = nullptr;
  }

  // The consumer's side.
  void Write(Response response) {
    MutexLock lock(mu_);
    if (reactor_ == nullptr || finished_) return;
    response.set_request_id(request_id_);
    pending_bytes_ += response.ByteSizeLong();
    pending_.push_back(std::move(response));
    if (pending_bytes_ > kMaxPendingBytes) {
      finished_ = true;
      status_ = {grpc::StatusCode::RESOURCE_EXHAUSTED, "the client reads too slowly"};
      context_->TryCancel();  // OnCancel follows, on another thread
    }
    Advance();
  }
  void Finish(grpc::Status status) {
    MutexLock lock(mu_);
    if (finished_) return;
    finished_ = true;
    status_ = std::move(status);
    Advance();
  }

 private:
  void Advance() SY_REQUIRES(mu_) {
    if (reactor_ == nullptr || writing_ || closed_) return;
    if (!pending_.empty()) {
      writing_ = true;
      reactor_->StartWrite(&pending_.front());
    } else if (finished_) {
      closed_ = true;
      reactor_->Finish(status_);
    }
  }

  const std::string request_id_;
  Mutex mu_;
  grpc::ServerWriteReactor<Response>* reactor_ SY_GUARDED_BY(mu_) =
      nullptr;  // with context_, until OnDone
  grpc::CallbackServerContext* context_ SY_GUARDED_BY(mu_) = nullptr;
  std::deque<Response> pending_ SY_GUARDED_BY(mu_);  // the front is being written
  size_t pending_bytes_ SY_GUARDED_BY(mu_) = 0;
  bool writing_ SY_GUARDED_BY(mu_) = false;
  bool finished_ SY_GUARDED_BY(mu_) = false;  // no more writes come
  bool closed_ SY_GUARDED_BY(mu_) = false;    // Finish was called
  grpc::Status status_ SY_GUARDED_BY(mu_);
};

void AddToken(const OutputToken& token, const Tokenizer& tokenizer, int32_t num_top,
              v1::TokenOutput* out) {
  out->set_token_id(token.id);
  if (token.scored) out->set_logprob(token.logprob);
  for (const auto& [id, logprob] : token.top) {
    if (out->top_size() == num_top) break;
    v1::TopLogprob* top = out->add_top();
    top->set_token_id(id);
    top->set_token(tokenizer.TokenText(id));
    top->set_logprob(logprob);
  }
}

class GrpcAnswer : public GenerationConsumer {
 public:
  GrpcAnswer(std::shared_ptr<Call> call, const Tokenizer* tokenizer, int32_t num_logprobs)
      : call_(std::move(call)), tokenizer_(tokenizer), num_logprobs_(num_logprobs) {}

  void OnAccepted() override {}

  // The last message is held back: it will carry usage if it turns out to be the last of all.
  void OnDeltas(std::vector<ChoiceDelta> deltas) override {
    for (const ChoiceDelta& delta : deltas) {
      Response response;
      response.set_index(delta.index);
      response.set_text(delta.text);
      AddTokens(delta, &response);
      if (delta.finish == FinishReason::kLength) response.set_finish_reason("length");
      if (delta.finish == FinishReason::kStop) response.set_finish_reason("stop");
      const bool empty = delta.text.empty() && response.tokens_size() == 0;
      if (delta.finish == FinishReason::kNone) {
        if (!empty) call_->Write(std::move(response));
        continue;
      }
      if (last_) call_->Write(std::move(*last_));
      last_ = std::make_unique<Response>(std::move(response));
    }
  }

  void OnDone(const Usage& usage) override {
    if (!last_) last_ = std::make_unique<Response>();
    last_->mutable_usage()->set_prompt_tokens(usage.prompt_tokens);
    last_->mutable_usage()->set_completion_tokens(usage.completion_tokens);
    last_->mutable_usage()->set_cached_tokens(usage.cached_tokens);
    call_->Write(std::move(*last_));
    call_->Finish(grpc::Status::OK);
  }

  void OnError(const absl::Status& status) override { call_->Finish(ToGrpcStatus(status)); }

 private:
  // All generated ids; logprobs where the text's tokens have them.
  void AddTokens(const ChoiceDelta& delta, Response* response) {
    if (num_logprobs_ < 0) {
      for (const int32_t id : delta.token_ids) response->add_tokens()->set_token_id(id);
      return;
    }
    for (const OutputToken& token : delta.tokens)
      AddToken(token, *tokenizer_, num_logprobs_, response->add_tokens());
  }

  const std::shared_ptr<Call> call_;
  const Tokenizer* const tokenizer_;
  const int32_t num_logprobs_;
  std::unique_ptr<Response> last_;  // of a choice that ended, not yet sent
};

class Reactor final : public grpc::ServerWriteReactor<Response> {
 public:
  Reactor(GrpcCallCount* calls, std::shared_ptr<Call> call, grpc::CallbackServerContext* context)
      : calls_(calls), call_(std::move(call)) {
    calls_->Add();
    call_->Attach(this, context);
  }

  // Task pool, once. The client may have gone already.
  void SetGeneration(const std::shared_ptr<Generation>& generation) {
    {
      MutexLock lock(mu_);
      generation_ = generation;
      if (!cancelled_) return;
    }
    generation->Cancel();
  }

  void OnWriteDone(bool ok) override { call_->OnWriteDone(ok); }

  void OnCancel() override {
    std::shared_ptr<Generation> generation;
    {
      MutexLock lock(mu_);
      cancelled_ = true;
      generation = generation_.lock();
    }
    if (generation) generation->Cancel();
    call_->Finish(grpc::Status::CANCELLED);
  }

  // gRPC is done with the call; the preparation on the task pool may not be.
  void OnDone() override {
    call_->Detach();
    Release();
  }

  // Two references: gRPC's and the preparation's.
  void Release() {
    if (references_.fetch_sub(1) > 1) return;
    GrpcCallCount* const calls = calls_;
    delete this;
    calls->Remove();
  }

 private:
  GrpcCallCount* const calls_;
  const std::shared_ptr<Call> call_;
  std::atomic<int> references_{2};
  Mutex mu_;
  std::weak_ptr<Generation> generation_ SY_GUARDED_BY(mu_);
  bool cancelled_ SY_GUARDED_BY(mu_) = false;
};

absl::Status Begin(FrontEnd* front_end, absl::StatusOr<GenerationRequest> request,
                   const std::shared_ptr<Call>& call, Reactor* reactor) {
  const auto engine = front_end->EngineForWork();
  if (!engine.ok()) return engine.status();
  if (!request.ok()) return request.status();
  const auto generation = front_end->Generate(
      *request, std::make_unique<GrpcAnswer>(call, (*engine)->tokenizer, request->logprobs));
  if (!generation.ok()) return generation.status();
  reactor->SetGeneration(*generation);
  return absl::OkStatus();
}

}  // namespace

void GrpcCallCount::Add() {
  MutexLock lock(mu_);
  ++num_;
}

void GrpcCallCount::Remove() {
  MutexLock lock(mu_);
  if (--num_ == 0) idle_.NotifyAll();
}

absl::Status GrpcCallCount::Check() {
  MutexLock lock(mu_);
  if (num_ <= max_) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("the server has ", max_, " gRPC calls at once, which is its limit"));
}

bool GrpcCallCount::WaitIdle(std::chrono::steady_clock::time_point deadline) {
  MutexLock lock(mu_);
  while (num_ > 0) {
    if (!idle_.WaitUntil(mu_, deadline) && std::chrono::steady_clock::now() >= deadline)
      return false;
  }
  return true;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  // gRPC's codes are absl's; the client sees its own mistakes as such, whatever found them.
  absl::StatusCode code = status.code();
  if (code == absl::StatusCode::kOutOfRange || code == absl::StatusCode::kFailedPrecondition) {
    code = absl::StatusCode::kInvalidArgument;
  }
  return {static_cast<grpc::StatusCode>(code), std::string(status.message())};
}

absl::StatusOr<GenerationRequest> FromProto(const v1::GenerateRequest& message) {
  GenerationRequest request;
  request.model = message.model();
  request.stream = true;
  request.return_token_ids = true;
  switch (message.input_case()) {
    case v1::GenerateRequest::kPrompt:
      if (message.prompt().empty()) return ParamError("prompt", "prompt must not be empty");
      request.prompts.push_back({.text = message.prompt(), .ids = {}});
      break;
    case v1::GenerateRequest::kTokens:
      if (message.tokens().ids().empty()) return ParamError("tokens", "tokens must not be empty");
      request.prompts.push_back(
          {.text = {},
           .ids = {message.tokens().ids().begin(), message.tokens().ids().end()},
           .is_text = false});
      break;
    case v1::GenerateRequest::kChat:
      if (message.chat().messages().empty())
        return ParamError("chat", "messages must not be empty");
      request.chat = true;
      request.conversation.messages = nlohmann::ordered_json::array();
      for (const v1::ChatMessage& one : message.chat().messages()) {
        request.conversation.messages.push_back({{"role", one.role()}, {"content", one.content()}});
      }
      request.conversation.now_unix_seconds = std::time(nullptr);
      break;
    case v1::GenerateRequest::INPUT_NOT_SET:
      return ParamError("prompt", "one of prompt, tokens and chat is required");
  }
  if (message.has_cache_salt() && message.cache_salt().empty())
    return ParamError("cache_salt", "cache_salt must not be empty");
  request.cache_salt = message.cache_salt();
  const v1::SamplingOptions& sampling = message.sampling();
  if (sampling.has_temperature()) request.temperature = sampling.temperature();
  if (sampling.has_top_p()) request.top_p = sampling.top_p();
  if (sampling.has_min_p()) request.min_p = sampling.min_p();
  if (sampling.has_top_k()) request.top_k = sampling.top_k();
  if (sampling.has_repetition_penalty()) request.repetition_penalty = sampling.repetition_penalty();
  request.presence_penalty = sampling.presence_penalty();
  request.frequency_penalty = sampling.frequency_penalty();
  if (sampling.has_seed()) request.seed = sampling.seed();
  if (sampling.has_max_tokens()) request.max_tokens = sampling.max_tokens();
  request.min_tokens = sampling.min_tokens();
  request.stop.assign(sampling.stop().begin(), sampling.stop().end());
  request.stop_token_ids.assign(sampling.stop_token_ids().begin(), sampling.stop_token_ids().end());
  request.ignore_eos = sampling.ignore_eos();
  // In the order of ids: a map's order must not decide anything.
  const std::map<int32_t, float> bias(sampling.logit_bias().begin(), sampling.logit_bias().end());
  request.logit_bias.assign(bias.begin(), bias.end());
  if (sampling.has_n()) request.n = sampling.n();
  if (sampling.has_logprobs()) {
    if (sampling.logprobs() < 0) {
      return ParamError("logprobs",
                        absl::StrCat("logprobs must be at least 0, got ", sampling.logprobs()));
    }
    request.logprobs = sampling.logprobs();
  }
  if (auto status = Validate(request); !status.ok()) return status;
  return request;
}

grpc::ServerWriteReactor<Response>* StartGrpcGenerate(FrontEnd* front_end, GrpcCallCount* calls,
                                                      grpc::CallbackServerContext* context,
                                                      const v1::GenerateRequest* message) {
  const auto arrival = std::chrono::steady_clock::now();
  const auto call = std::make_shared<Call>(message->request_id());
  auto* reactor = new Reactor(calls, call, context);
  const auto& metadata = context->client_metadata();
  const auto key = metadata.find("authorization");
  absl::Status allowed = front_end->Authorize(
      key == metadata.end() ? std::string_view()
                            : std::string_view(key->second.data(), key->second.size()));
  if (allowed.ok()) {
    allowed = calls->Check();
    if (!allowed.ok()) front_end->metrics().CountRejection(RejectionReason::kQueueFull);
  }
  if (!allowed.ok()) {
    call->Finish(ToGrpcStatus(allowed));
    reactor->Release();
    return reactor;
  }
  // The message may go when the call ends, which a client can cause at any time: the task has its
  // own copy.
  front_end->pool().Post([front_end, call, reactor, arrival,
                          copy = std::make_shared<const v1::GenerateRequest>(*message)] {
    auto request = FromProto(*copy);
    if (request.ok()) request->arrival = arrival;
    const absl::Status status = Begin(front_end, std::move(request), call, reactor);
    if (!status.ok()) call->Finish(ToGrpcStatus(status));
    reactor->Release();
  });
  return reactor;
}

}  // namespace switchyard
