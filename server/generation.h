// Generation: one accepted request on its way: submits its prompts to the scheduler, turns the
// events of all its choices into text (detokenizing, stop strings, logprobs, usage), and hands it
// to a consumer: HTTP, gRPC or the terminal. What a consumer gets is final: it counts only what was
// kept, and the joined deltas are the same for every protocol.
//
// Owned by the scheduler's sinks while requests run, and by whoever may cancel it. Events are
// queued by the scheduler's thread and worked off on the task pool, never on two threads at once.
// Cancel and Fail: any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/mutex.h"
#include "scheduler/request.h"
#include "server/choice_assembler.h"
#include "server/engine.h"
#include "server/generation_request.h"
#include "server/metrics.h"
#include "server/task_pool.h"

namespace switchyard {

struct Usage {
  int32_t prompt_tokens = 0;  // each prompt once
  int32_t completion_tokens = 0;
  int32_t cached_tokens = 0;
};

// Where the output goes. Calls come one at a time; after OnDone or OnError none.
class GenerationConsumer {
 public:
  virtual ~GenerationConsumer() = default;
  virtual void OnAccepted() = 0;  // before everything else, on the thread that called Start
  virtual void OnDeltas(std::vector<ChoiceDelta> deltas) = 0;
  virtual void OnDone(const Usage& usage) = 0;
  virtual void OnError(const absl::Status& status) = 0;
};

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  // What all generations of a server share; outlives them.
  struct Context {
    const Engine* engine = nullptr;
    TaskPool* pool = nullptr;
    Metrics* metrics = nullptr;
  };

  // Submits `prepared` (one Request per prompt of `request`). On an error nothing was accepted and
  // `consumer` has not been called.
  static absl::StatusOr<std::shared_ptr<Generation>> Start(
      const Context& context, const GenerationRequest& request, std::vector<Request> prepared,
      std::unique_ptr<GenerationConsumer> consumer);

  // The client has gone: frees everything; the consumer is not called again.
  void Cancel();
  // Ends the request with an error for its client. Ignored when it has ended.
  void Fail(absl::Status status);

 private:
  using Clock = std::chrono::steady_clock;

  struct Choice {
    ChoiceAssembler assembler;
    int32_t prompt = 0;  // index into prompts_
    bool done = false;
    Clock::time_point last_token;
    Clock::time_point first_scheduled;
    Clock::time_point prefill_done;
  };
  struct Prompt {
    int32_t num_tokens = 0;
    int32_t cached_tokens = 0;
    RequestId id = 0;
  };
  struct Arrived {
    Clock::time_point time;
    int32_t prompt = 0;
    std::vector<ChoiceEvent> events;
  };

  Generation(const Context& context, const GenerationRequest& request,
             const std::vector<Request>& prepared, std::unique_ptr<GenerationConsumer> consumer);

  absl::Status Submit(std::vector<Request> prepared);
  void Enqueue(int32_t prompt, std::vector<ChoiceEvent> events);  // scheduler's thread
  void Wake();
  void Run();  // task pool, one at a time
  void Work();
  void Apply(const Arrived& arrived, ChoiceEvent& event, std::vector<ChoiceDelta>* deltas);
  void FinishChoice(Choice& choice, FinishReason reason, Clock::time_point now);
  void End(FinishReason reason);  // of all choices that still run
  void CancelInScheduler();

  const Context context_;
  const int32_t n_;
  const Clock::time_point arrival_;
  const std::unique_ptr<GenerationConsumer> consumer_;
  std::atomic<int> wakes_{0};  // > 0: queued on the pool or running
  std::atomic<bool> cancelled_{false};

  Mutex mu_;
  bool started_ SY_GUARDED_BY(mu_) = false;
  std::vector<Arrived> arrived_ SY_GUARDED_BY(mu_);
  absl::Status failure_ SY_GUARDED_BY(mu_);
  std::vector<RequestId> submitted_ SY_GUARDED_BY(mu_);

  // Task pool only, one thread at a time.
  std::vector<Choice> choices_;  // prompt · n + choice
  std::vector<Prompt> prompts_;
  int32_t num_running_ = 0;
  bool ended_ = false;
};

}  // namespace switchyard
