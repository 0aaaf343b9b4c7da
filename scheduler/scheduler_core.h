// SchedulerCore: all decisions of the scheduler, without threads, clocks or workers. Owned by the
// Scheduler, on its thread (Validate alone may be called from any); tests drive it with fake
// workers and a virtual clock:
//
//   Admit   waiting sequences get an attention worker and KV blocks for all their known tokens
//   Plan    running sequences get rows in the next step; decodes grow their block tables,
//   preempting the youngest
//           sequence of the worker when no block is left, once it has no rows in flight
//   Apply   one worker's result is committed: KV is computed, tokens are appended, full blocks
//   enter the prefix cache
//
// Up to max_steps_in_flight steps may be planned and not applied; workers run them in order. The
// next one counts on those before: their rows are computed, the ids that they draw are known to the
// worker. What comes otherwise (a stop, an error, a cancelled request) makes a row superfluous, and
// it is dropped at Apply.
//
// The attention workers come and go with epochs (core_epoch.cc): nothing is admitted or planned
// before the first Install, nor between Pause or EndEpoch and the next Install; the rest goes on.
//
// Sequences change only in Apply; what is in flight lies in a StepRecord, which an error discards.
// Priority is the sequence id (age) everywhere: the oldest sequence of a worker is never preempted
// and fits alone, so it always gets on.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "proto/epoch.h"
#include "proto/model_info.h"
#include "proto/step_plan.h"
#include "scheduler/batch_policy.h"
#include "scheduler/block_hash.h"
#include "scheduler/block_manager.h"
#include "scheduler/request.h"
#include "scheduler/scheduler.h"
#include "scheduler/sequence.h"

namespace switchyard {

class SchedulerCore {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  struct Step {
    uint64_t step = 0;
    std::vector<std::pair<int32_t, StepPlan>> plans;  // by attention rank, ascending
  };
  // All events of one step for one request, in the order of its choices.
  struct Delivery {
    std::shared_ptr<const Request> request;
    std::vector<ChoiceEvent> events;
  };
  // Requests none of whose choices is queued any more since the last call, and the prompt tokens of
  // the choices that left (each choice holds its prompt): room in the bounded queue.
  struct LeftQueue {
    int32_t requests = 0;
    int64_t tokens = 0;
  };

  SchedulerCore(const SchedulerOptions& options, const ModelInfo& model);

  // kInvalidArgument, with the numbers, when the request can never run.
  absl::Status Validate(const Request& request) const;
  // Queues it. Ids ascend. REQUIRES: Validate(request).ok().
  void Submit(RequestId id, Request request);
  // Ends the request or the choice at once, without an event. Its rows in flight are dropped when
  // they come back.
  void Cancel(RequestId id);
  void CancelChoice(RequestId id, int32_t choice);
  // Ends every request with an error event.
  void EndAll(const absl::Status& error);

  // Workers that were in the epoch before keep their KV, prefix cache and sequences; sequences of
  // the others wait again, with the tokens they have. REQUIRES: after Pause (and its step) or
  // EndEpoch; a number above all before.
  void Install(const EpochView& view);
  void Pause(const EpochPause& pause);
  // The epoch whose pause is to be acknowledged now: nothing of it is in flight any more.
  std::optional<uint64_t> TakePaused();
  // Discards the steps in flight; strikes whom it may be due to.
  void EndEpoch(const EpochEnd& end);
  // Ends every request; whatever comes until the next Install is to be ended, too.
  void BecomeUnavailable(const absl::Status& status);

  void Admit();
  // The next step; none when it may not be planned yet or there is nothing to do. REQUIRES: Admit
  // was called before.
  std::optional<Step> Plan(TimePoint now);
  // Commits `result`; stale ones are counted and dropped. An observation when it completed the
  // step.
  std::optional<StepObservation> Apply(const StepResult& result, TimePoint now);
  // What became deliverable; to be taken after each Apply, EndEpoch and EndAll, before anything is
  // cancelled.
  std::vector<Delivery> TakeDeliveries() { return std::exchange(deliveries_, {}); }
  LeftQueue TakeLeftQueue() { return std::exchange(left_queue_, {}); }

  bool idle() const { return requests_.empty(); }
  bool step_in_flight() const { return !in_flight_.empty(); }
  bool CanPlan() const;                          // the next step may be planned now
  bool failed() const { return stats_.failed; }  // the workers are given up; accept nothing more
  const absl::Status& unavailable() const { return unavailable_; }  // OK: it is not
  SchedulerStats Stats() const;  // last_progress is left to the caller
  // CHECKs sequences, block tables and reference counts against each other.
  void CheckIntegrity() const;

 private:
  struct RequestState {
    std::shared_ptr<const Request> request;
    std::vector<std::unique_ptr<Sequence>> choices;  // null once ended
    BlockHash root;                                  // of its block hashes
    int32_t live = 0;                                // choices not ended
    int32_t queued = 0;                              // choices that have not run yet
    bool counted = false;                            // in the statistics of prompts
    bool prompt_computed = false;                    // by one of its choices
    int32_t worker = -1;                             // rank where the latest choice was started
  };
  struct Row {
    SequenceId sequence = 0;
    uint32_t run = 0;
    int32_t start = 0;
    int32_t count = 0;
    bool sample = false;
  };
  struct WorkerShare {
    int32_t worker = 0;  // rank
    bool applied = false;
    bool discarded = false;  // the worker failed in an earlier step: nothing of it will count
    std::vector<Row> rows;   // by sequence
    std::vector<SequenceEnd> ended;
  };
  struct StepRecord {
    uint64_t step = 0;
    TimePoint planned;
    MicroBatchSample sample;  // its times come with the results
    std::vector<WorkerShare> shares;
    int32_t num_rows = 0;  // positions
    int32_t num_sequences = 0;
    int32_t outstanding = 0;  // shares not applied
    int64_t worker_ns = 0;    // of all shares applied
    int64_t wait_ns = 0;
    bool aborted = false;    // some worker failed
    std::string fatal;       // why no worker can go on; empty: they can
    bool succeeded = false;  // some worker did not
  };
  // A sequence as it will be when all its rows in flight have been applied.
  struct Outlook {
    int32_t computed = 0;
    int32_t total = 0;       // ids, those included that steps in flight draw
    int32_t pending = 0;     // rows that it could use in the next step
    bool decoding = false;   // one row, which draws its next token
    bool in_flight = false;  // it has rows in flight
  };
  struct Placement {
    int32_t worker = -1;          // rank
    std::vector<int32_t> prefix;  // cached blocks there
  };
  struct Member {  // an attention worker of the epoch
    uint64_t worker = 0;
    BlockManager blocks;
    std::vector<SequenceEnd> ended;  // to tell in its next plan
  };

  // scheduler_core.cc: requests, admission.
  bool HasHome(const Sequence& sequence) const;  // fits some worker, when that is empty
  bool WaitsForSibling(const Sequence& sequence) const;
  std::optional<Placement> Place(Sequence& sequence);
  void Start(Sequence& sequence, Placement placement);
  void LeaveQueue(RequestState& state);  // one choice
  void End(Sequence& sequence);          // removes it; the last choice ends the request

  // core_plan.cc: planning, preemption.
  Outlook OutlookOf(const Sequence& sequence) const;
  void Preempt(Sequence& sequence);
  Sequence& YoungestOn(int32_t worker);
  bool Reserve(Sequence& sequence, int32_t positions);
  std::vector<RowPick> PickAndReserve();
  std::vector<RowPick> PickSome();
  StepHeader NextHeader(const std::vector<RowPick>& picks, int32_t* fullest);

  // core_apply.cc: results, events, failures.
  std::string CheckResult(const WorkerShare& share, const StepResult& result) const;
  Sequence* LiveRow(const Row& row) const;
  void CommitShare(const WorkerShare& share, const StepResult& result, TimePoint now);
  void CommitRow(Sequence& sequence, const Row& row, const SequenceResult& result, TimePoint now);
  void AbortShare(const StepRecord& record, const WorkerShare& share, const std::string& error);
  void TellAnew(const WorkerShare& share);
  void StrikeRows(const std::vector<Row>& rows, bool alone, const std::string& error);
  void CountTimes(const StepRecord& record);
  StepObservation FinishStep(uint64_t step, TimePoint now);
  void FailRequest(RequestId id, const absl::Status& error);
  ChoiceEvent& EventOf(const Sequence& sequence);
  void FlushEvents();

  // core_epoch.cc.
  int32_t MoveSequences(const std::vector<int32_t>& new_rank);

  // Aborted steps without progress: one fewer and the sequence runs alone, this many (the last
  // alone) and it fails.
  static constexpr int32_t kMaxStrikes = 3;
  // More aborted steps in a row than bad requests explain: the fault lies with the workers.
  static constexpr int32_t kAbortsToGiveUp = 512;

  int32_t BlocksFor(int32_t positions) const { return (positions + block_size_ - 1) / block_size_; }

  // Constant after construction.
  const SchedulerOptions options_;
  const int32_t vocab_size_;
  const int32_t max_model_len_;
  const uint32_t num_routing_profiles_;
  const int32_t block_size_;
  const int32_t num_blocks_;  // of a worker, bounds requests
  const int64_t capacity_;    // positions, the same bound
  const BlockHasher hasher_;

  std::unordered_map<RequestId, RequestState> requests_;
  std::map<SequenceId, Sequence*> waiting_;  // by age
  std::map<SequenceId, Sequence*> running_;  // by age
  std::vector<Member> members_;              // by rank, of the last epoch installed
  uint64_t epoch_ = 0;                       // 0: none yet
  bool planning_ = false;                    // the epoch lives and is not paused
  bool pausing_ = false;                     // TakePaused is to say so
  absl::Status unavailable_;
  std::deque<StepRecord> in_flight_;      // oldest first, at most max_steps_in_flight
  std::map<RequestId, Delivery> events_;  // of the steps in flight
  TimePoint last_finish_;                 // of a step
  std::vector<Delivery> deliveries_;
  LeftQueue left_queue_;
  SequenceId next_sequence_ = 1;
  uint64_t next_step_ = 1;
  uint64_t slots_generation_ = 0;
  std::vector<int32_t> last_participants_;
  MicroBatchPolicy micro_batch_policy_;
  int32_t consecutive_aborts_ = 0;
  SchedulerStats stats_;
};

}  // namespace switchyard
