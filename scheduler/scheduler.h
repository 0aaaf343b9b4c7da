// Scheduler: admission, batching, KV accounting; Admit -> Plan -> Execute -> Apply on one thread of
// its own. It never computes and knows no text. Submit, Cancel, Drain and Stats may be called from
// any thread: they only enqueue or read an immutable snapshot.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/model_info.h"
#include "scheduler/micro_batch_policy.h"
#include "scheduler/request.h"
#include "scheduler/worker_client.h"

namespace switchyard {

struct SchedulerOptions {
  int32_t max_num_seqs = 256;             // sequences in a step, over all attention workers
  int32_t max_num_batched_tokens = 2048;  // rows in a step, over all participants
  int32_t max_queued_requests = 1024;     // waiting, not yet running; more are refused
  int64_t max_queued_tokens = 4 << 20;    // prompt tokens of waiting requests
  bool enable_prefix_caching = true;
  MicroBatchMode micro_batches = MicroBatchMode::kAuto;
  // 1: a step is planned when the one before has been applied (the specification). 2: the next one
  // is planned and sent while it runs.
  int32_t max_steps_in_flight = 2;
};

// A consistent picture taken after a step. Counters since start.
struct SchedulerStats {
  int32_t running = 0;  // sequences
  int32_t waiting = 0;
  double kv_usage = 0;  // 0 … 1, blocks in use by sequences
  uint64_t steps = 0;
  uint64_t preemptions = 0;
  uint64_t moved_sequences = 0;  // to be prefilled elsewhere because their worker left
  uint64_t prompt_tokens = 0;    // of admitted requests
  uint64_t cached_tokens = 0;
  uint64_t generation_tokens = 0;
  uint64_t batched_tokens = 0;     // rows over all steps
  uint64_t two_micro_batches = 0;  // steps in two micro-batches
  double worker_seconds = 0;       // that attention workers spent in steps
  double wait_seconds = 0;         // of it waiting for their peers
  uint64_t worker_errors = 0;      // steps that a worker answered with an error
  uint64_t lost_steps = 0;         // in flight when their epoch ended
  uint64_t dropped_results = 0;    // stale, or of sequences that ended or were preempted meanwhile
  // Advances at least every second while no step runs or the workers make progress with one. So
  // `now - last_progress` beyond a stall timeout means that the loop or a worker hangs; busy is not
  // dead.
  std::chrono::steady_clock::time_point last_progress;
  uint64_t epoch = 0;        // the last one installed; 0: none yet, requests wait
  bool unavailable = false;  // there is none for too long; requests are refused meanwhile
  bool failed = false;       // the workers only fail; accepted requests were ended with an error
};

struct StepObservation {  // for histograms; called on the scheduler's thread after each step
  double seconds = 0;
  int32_t tokens = 0;
};

class Scheduler {
 public:
  // `client` must outlive the scheduler. The thread starts in Start(). The destructor ends what is
  // left with kUnavailable events and does not wait for a step in flight; its late results are
  // ignored.
  Scheduler(const SchedulerOptions& options, const ModelInfo& model, WorkerClient* client);
  ~Scheduler();

  void Start();
  // May be called before Start. kResourceExhausted when the queue is full (message names the
  // numbers), kUnavailable when draining, failed or without workers for too long, kInvalidArgument
  // when it can never fit. The id is valid when OK.
  absl::StatusOr<RequestId> Submit(Request request);
  // Ends all choices of a request, or one. No further event is sent for them, except by a sink call
  // that already runs. Unknown ids are ignored.
  void Cancel(RequestId id);
  void CancelChoice(RequestId id, int32_t choice);
  // Refuses new requests; `done` is called (on the scheduler's thread) when nothing is left.
  void Drain(std::function<void()> done);
  SchedulerStats Stats() const;
  void SetStepObserver(std::function<void(const StepObservation&)> observer);  // before Start

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace switchyard
