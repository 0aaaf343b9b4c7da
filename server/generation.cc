#include "server/generation.h"

#include <algorithm>

#include "kernels/check.h"

namespace switchyard {
namespace {

double Seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

bool IsSet(std::chrono::steady_clock::time_point time) {
  return time != std::chrono::steady_clock::time_point();
}

}  // namespace

Generation::Generation(const Context& context, const GenerationRequest& request,
                       const std::vector<Request>& prepared,
                       std::unique_ptr<GenerationConsumer> consumer)
    : context_(context), n_(request.n), arrival_(request.arrival), consumer_(std::move(consumer)) {
  for (size_t p = 0; p < prepared.size(); ++p) {
    prompts_.push_back({.num_tokens = static_cast<int32_t>(prepared[p].prompt.size())});
    for (int32_t i = 0; i < n_; ++i) {
      const int32_t index = static_cast<int32_t>(choices_.size());
      choices_.push_back(
          {.assembler = ChoiceAssembler(request, *context.engine, index, prepared[p].prompt),
           .prompt = static_cast<int32_t>(p),
           .last_token = {},
           .first_scheduled = {},
           .prefill_done = {}});
    }
  }
  num_running_ = static_cast<int32_t>(choices_.size());
}

absl::StatusOr<std::shared_ptr<Generation>> Generation::Start(
    const Context& context, const GenerationRequest& request, std::vector<Request> prepared,
    std::unique_ptr<GenerationConsumer> consumer) {
  std::shared_ptr<Generation> generation(
      new Generation(context, request, prepared, std::move(consumer)));
  if (auto status = generation->Submit(std::move(prepared)); !status.ok()) {
    generation->CancelInScheduler();
    return status;
  }
  generation->consumer_->OnAccepted();
  {
    MutexLock lock(generation->mu_);
    generation->started_ = true;
  }
  generation->Wake();
  return generation;
}

absl::Status Generation::Submit(std::vector<Request> prepared) {
  for (size_t p = 0; p < prepared.size(); ++p) {
    prepared[p].sink = [self = shared_from_this(), p](std::vector<ChoiceEvent> events) {
      self->Enqueue(static_cast<int32_t>(p), std::move(events));
    };
    const auto id = context_.engine->scheduler->Submit(std::move(prepared[p]));
    if (!id.ok()) return id.status();
    prompts_[p].id = *id;
    MutexLock lock(mu_);
    submitted_.push_back(*id);
  }
  for (const Prompt& prompt : prompts_) context_.metrics->ObservePrompt(prompt.num_tokens);
  return absl::OkStatus();
}

void Generation::CancelInScheduler() {
  std::vector<RequestId> ids;
  {
    MutexLock lock(mu_);
    ids.swap(submitted_);
  }
  for (const RequestId id : ids) context_.engine->scheduler->Cancel(id);
}

void Generation::Cancel() {
  if (cancelled_.exchange(true)) return;
  CancelInScheduler();
  Wake();
}

void Generation::Fail(absl::Status status) {
  {
    MutexLock lock(mu_);
    failure_.Update(std::move(status));
  }
  Wake();
}

void Generation::Enqueue(int32_t prompt, std::vector<ChoiceEvent> events) {
  const auto now = Clock::now();
  {
    MutexLock lock(mu_);
    arrived_.push_back({now, prompt, std::move(events)});
  }
  Wake();
}

void Generation::Wake() {
  if (wakes_.fetch_add(1) == 0) {
    context_.pool->Post([self = shared_from_this()] { self->Run(); });
  }
}

void Generation::Run() {
  const int seen = wakes_.load();
  Work();
  // Woken meanwhile: queue again behind the others, so that one busy stream does not hold a thread.
  if (wakes_.fetch_sub(seen) != seen) {
    context_.pool->Post([self = shared_from_this()] { self->Run(); });
  }
}

void Generation::Work() {
  std::vector<Arrived> arrived;
  absl::Status failure;
  {
    MutexLock lock(mu_);
    if (!started_) return;
    arrived.swap(arrived_);
    failure = failure_;
  }
  if (ended_) return;
  if (cancelled_.load()) {
    End(FinishReason::kCancelled);
    return;
  }
  std::vector<ChoiceDelta> deltas;
  for (Arrived& batch : arrived) {
    for (ChoiceEvent& event : batch.events) {
      if (event.finished && event.reason == FinishReason::kError) failure.Update(event.error);
      Apply(batch, event, &deltas);
    }
  }
  if (!failure.ok()) {
    CancelInScheduler();
    End(FinishReason::kError);
    consumer_->OnError(failure);
    return;
  }
  if (!deltas.empty()) consumer_->OnDeltas(std::move(deltas));
  if (num_running_ > 0) return;
  ended_ = true;
  Usage usage;
  for (const Prompt& prompt : prompts_) {
    usage.prompt_tokens += prompt.num_tokens;
    usage.cached_tokens += prompt.cached_tokens;
  }
  for (const Choice& choice : choices_) usage.completion_tokens += choice.assembler.num_generated();
  consumer_->OnDone(usage);
}

void Generation::Apply(const Arrived& arrived, ChoiceEvent& event,
                       std::vector<ChoiceDelta>* deltas) {
  SY_CHECK_LT(event.choice, n_);
  Choice& choice = choices_[static_cast<size_t>(arrived.prompt) * n_ + event.choice];
  if (choice.done || event.reason == FinishReason::kError)
    return;  // beyond a stop string, or reported by the caller
  if (IsSet(event.first_scheduled)) choice.first_scheduled = event.first_scheduled;
  if (IsSet(event.prefill_done)) choice.prefill_done = event.prefill_done;
  Prompt& prompt = prompts_[arrived.prompt];
  prompt.cached_tokens = std::max(prompt.cached_tokens, event.cached_tokens);

  const int32_t num_before = choice.assembler.num_generated();
  ChoiceDelta delta = choice.assembler.Push(event);
  const int32_t num_new = choice.assembler.num_generated() - num_before;
  if (num_new > 0) {
    context_.metrics->CountGeneratedTokens(num_new);
    if (num_before == 0) {
      context_.metrics->ObserveTimeToFirstToken(Seconds(arrived.time - arrival_));
    } else {
      context_.metrics->ObserveInterTokenLatency(Seconds(arrived.time - choice.last_token) /
                                                 num_new);
    }
    choice.last_token = arrived.time;
  }
  if (delta.finish != FinishReason::kNone) {
    if (choice.assembler.stopped_by_string() && !event.finished) {
      context_.engine->scheduler->CancelChoice(prompt.id, event.choice);
    }
    FinishChoice(choice, delta.finish, arrived.time);
  }
  deltas->push_back(std::move(delta));
}

void Generation::FinishChoice(Choice& choice, FinishReason reason, Clock::time_point now) {
  choice.done = true;
  --num_running_;
  ChoiceTimes times{.queue = {},
                    .prefill = {},
                    .decode = {},
                    .e2e = Seconds(now - arrival_),
                    .generated = choice.assembler.num_generated(),
                    .reason = reason};
  if (IsSet(choice.first_scheduled)) times.queue = Seconds(choice.first_scheduled - arrival_);
  if (IsSet(choice.prefill_done)) {
    times.prefill = Seconds(choice.prefill_done - choice.first_scheduled);
    times.decode = Seconds(now - choice.prefill_done);
  }
  context_.metrics->ObserveChoice(times);
}

void Generation::End(FinishReason reason) {
  ended_ = true;
  const auto now = Clock::now();
  for (Choice& choice : choices_) {
    if (!choice.done) FinishChoice(choice, reason, now);
  }
}

}  // namespace switchyard
