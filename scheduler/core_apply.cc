// SchedulerCore: results, events, failures.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "scheduler/scheduler_core.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

// What a worker says of its times beyond this is nonsense; an hour's step has long been stalled.
constexpr int64_t kMaxStepNs = int64_t{3600} * 1'000'000'000;

double Seconds(std::chrono::steady_clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

// Results come in the order of the plan's work, as a rule; any order is legal.
const SequenceResult* FindResult(const StepResult& result, size_t hint, SequenceId sequence) {
  if (hint < result.results.size() && result.results[hint].sequence == sequence) {
    return &result.results[hint];
  }
  const auto it = std::find_if(result.results.begin(), result.results.end(),
                               [&](const SequenceResult& r) { return r.sequence == sequence; });
  return it == result.results.end() ? nullptr : &*it;
}

}  // namespace

std::optional<StepObservation> SchedulerCore::Apply(const StepResult& result, TimePoint now) {
  WorkerShare* share = nullptr;
  StepRecord* record = nullptr;
  bool overtakes = false;  // another step of this worker
  for (StepRecord& r : in_flight_) {
    if (result.epoch != epoch_ || r.step > result.step) break;
    for (WorkerShare& s : r.shares) {
      if (s.worker != result.worker || s.applied) continue;
      overtakes = overtakes || share != nullptr;
      share = &s;
      record = &r;
    }
  }
  if (share == nullptr || record->step != result.step) {
    ++stats_.dropped_results;
    return std::nullopt;
  }
  share->applied = true;
  if (share->discarded) {
    ++stats_.dropped_results;
    return --record->outstanding > 0 ? std::nullopt : std::optional(FinishStep(result.step, now));
  }
  std::string error = result.error;
  if (error.empty() && overtakes) error = "it left out a step";
  if (error.empty()) error = CheckResult(*share, result);
  if (error.empty()) {
    record->succeeded = true;
    const int64_t step_ns = std::clamp<int64_t>(result.step_ns, 0, kMaxStepNs);
    record->sample.step_ns = std::max(record->sample.step_ns, step_ns);
    record->worker_ns += step_ns;
    record->wait_ns += std::clamp<int64_t>(result.wait_ns, 0, step_ns);
    CommitShare(*share, result, now);
  } else {
    record->aborted = true;
    if (result.fatal) record->fatal = error;
    AbortShare(*record, *share, error);
  }
  if (--record->outstanding > 0) return std::nullopt;
  return FinishStep(result.step, now);
}

// The sequence of a row, unless it ended or was preempted meanwhile.
Sequence* SchedulerCore::LiveRow(const Row& row) const {
  const auto it = running_.find(row.sequence);
  return it == running_.end() || it->second->run() != row.run ? nullptr : it->second;
}

// What is wrong with a worker's answer; empty when nothing is.
std::string SchedulerCore::CheckResult(const WorkerShare& share, const StepResult& result) const {
  for (size_t i = 0; i < share.rows.size(); ++i) {
    const Row& row = share.rows[i];
    // Of those that are gone as well: who answers nothing has perhaps not seen the plan.
    const SequenceResult* r = FindResult(result, i, row.sequence);
    if (r == nullptr || r->run != row.run) {
      return absl::StrCat("no result for sequence ", row.sequence, " run ", row.run);
    }
    if (LiveRow(row) == nullptr || !r->finite) continue;
    if (r->computed != row.start + row.count) {
      return absl::StrCat("sequence ", row.sequence, " computed ", r->computed,
                          " positions, planned ", row.start + row.count);
    }
    if (row.sample && (r->token < 0 || r->token >= vocab_size_)) {
      return absl::StrCat("sequence ", row.sequence, " drew token ", r->token,
                          " outside the vocabulary of ", vocab_size_);
    }
    if (!r->prompt_logprobs.empty() && r->prompt_logprobs_start < 1) {
      return absl::StrCat("sequence ", row.sequence, " has prompt logprobs from position ",
                          r->prompt_logprobs_start);
    }
  }
  return "";
}

void SchedulerCore::CommitShare(const WorkerShare& share, const StepResult& result, TimePoint now) {
  for (size_t i = 0; i < share.rows.size(); ++i) {
    const Row& row = share.rows[i];
    Sequence* sequence =
        LiveRow(row);  // again for each: a failed request takes its other choices along
    if (sequence == nullptr) {
      ++stats_.dropped_results;
      continue;
    }
    const SequenceResult& r = *FindResult(result, i, row.sequence);
    if (r.finite) {
      CommitRow(*sequence, row, r, now);
    } else {
      FailRequest(sequence->request(),
                  absl::InternalError(absl::StrCat("the logits at position ",
                                                   row.start + row.count - 1, " are not finite")));
    }
  }
}

void SchedulerCore::CommitRow(Sequence& sequence, const Row& row, const SequenceResult& result,
                              TimePoint now) {
  SY_CHECK_EQ(row.start, sequence.computed());
  sequence.Advance(row.start + row.count);
  RequestState& state = requests_.at(sequence.request());
  if (options_.enable_prefix_caching) {
    const int32_t full = sequence.computed() / block_size_;
    const auto hashes = sequence.Hashes(hasher_, state.root, block_size_, full);
    for (int32_t i = row.start / block_size_; i < full; ++i) {
      members_[sequence.worker()].blocks.Commit(sequence.blocks()[i], hashes[i]);
    }
  }
  for (size_t i = 0; i < result.prompt_logprobs.size(); ++i) {
    sequence.SetPromptLogprob(result.prompt_logprobs_start + static_cast<int32_t>(i),
                              result.prompt_logprobs[i]);
  }
  if (sequence.computed() < sequence.prompt_length()) return;
  state.prompt_computed = true;
  if (sequence.prefill_done == TimePoint()) sequence.prefill_done = now;
  if (sequence.computed() < sequence.total())
    return;  // computing again what it had before a preemption

  // It drew a token, or it was to compute the prompt only.
  ChoiceEvent& event = EventOf(sequence);
  if (sequence.has_prompt_logprobs()) event.prompt_logprobs = sequence.TakePromptLogprobs();
  bool stop = false;
  if (row.sample) {
    const std::vector<int32_t>& stop_ids = state.request->stop_token_ids;
    stop = sequence.generated() >= sequence.sampling().min_tokens &&
           std::find(stop_ids.begin(), stop_ids.end(), result.token) != stop_ids.end();
    sequence.Append(result.token);
    ++stats_.generation_tokens;
    event.tokens.push_back(result.token);
    if (sequence.sampling().num_logprobs >= 0) event.logprobs.push_back(result.logprob);
  }
  if (!stop && sequence.total() < sequence.limit()) return;
  event.finished = true;
  event.reason = stop ? FinishReason::kStop : FinishReason::kLength;
  End(sequence);
}

// Nothing of the share counts. Its sequences keep their committed KV and are told to the worker
// anew: it may have lost them. What it was sent meanwhile counted on them, and does not count
// either.
void SchedulerCore::AbortShare(const StepRecord& record, const WorkerShare& share,
                               const std::string& error) {
  ++stats_.worker_errors;
  spdlog::error("attention rank {} aborted step {}: {}", share.worker, record.step, error);
  TellAnew(share);
  for (StepRecord& later : in_flight_) {
    for (WorkerShare& s : later.shares) {
      if (s.worker != share.worker || s.applied) continue;
      s.discarded = true;
      later.aborted = true;
      TellAnew(s);
    }
  }
  StrikeRows(share.rows, record.num_sequences == 1, error);
}

void SchedulerCore::TellAnew(const WorkerShare& share) {
  std::vector<SequenceEnd>& ended = members_[share.worker].ended;
  ended.insert(ended.end(), share.ended.begin(), share.ended.end());
  for (const Row& row : share.rows) {
    Sequence* sequence = LiveRow(row);
    if (sequence == nullptr) continue;
    ended.push_back({sequence->id()});
    sequence->ForgetTold();
  }
}

// `alone`: the step had rows of one sequence only.
void SchedulerCore::StrikeRows(const std::vector<Row>& rows, bool alone, const std::string& error) {
  for (const Row& row : rows) {
    Sequence* sequence = LiveRow(row);
    if (sequence == nullptr) continue;
    sequence->Strike();
    if (sequence->strikes() < kMaxStrikes || !alone) continue;
    spdlog::error("request {} failed: {} aborted steps without progress, the last one alone",
                  sequence->request(), sequence->strikes());
    FailRequest(sequence->request(),
                absl::InternalError(absl::StrCat("the request failed after ", kMaxStrikes,
                                                 " aborted steps, the last one alone: ", error)));
  }
}

void SchedulerCore::CountTimes(const StepRecord& record) {
  constexpr double kSecondsPerNs = 1e-9;
  if (record.sample.micro_batches > 1) ++stats_.two_micro_batches;
  stats_.worker_seconds += kSecondsPerNs * static_cast<double>(record.worker_ns);
  stats_.wait_seconds += kSecondsPerNs * static_cast<double>(record.wait_ns);
  if (record.aborted) micro_batch_policy_.Fail(record.sample);
  if (record.aborted || record.worker_ns == 0) return;
  MicroBatchSample sample = record.sample;
  sample.wait_share = static_cast<double>(record.wait_ns) / static_cast<double>(record.worker_ns);
  micro_batch_policy_.Observe(sample);
}

StepObservation SchedulerCore::FinishStep(uint64_t step, TimePoint now) {
  const auto finished = std::ranges::find(in_flight_, step, &StepRecord::step);
  const StepRecord record = std::move(*finished);
  in_flight_.erase(finished);
  FlushEvents();
  ++stats_.steps;
  stats_.batched_tokens += record.num_rows;
  CountTimes(record);
  if (record.aborted) last_participants_.clear();  // their planner state may differ now
  // A step that was only discarded because the one before it failed is the same failure.
  const bool discarded = std::ranges::all_of(record.shares, &WorkerShare::discarded);
  if (!discarded) consecutive_aborts_ = record.succeeded ? 0 : consecutive_aborts_ + 1;
  std::string why = record.fatal;
  if (consecutive_aborts_ > kAbortsToGiveUp)
    why = absl::StrCat(consecutive_aborts_, " steps in a row were aborted");
  if (!why.empty() && !stats_.failed) {
    stats_.failed = true;
    spdlog::critical("the workers are given up: {}", why);
    EndAll(absl::UnavailableError(absl::StrCat("the workers failed: ", why)));
  }
  // It began when it was planned, or when the one before it was done.
  const TimePoint began = std::max(record.planned, std::exchange(last_finish_, now));
  return {.seconds = Seconds(now - began), .tokens = record.num_rows};
}

void SchedulerCore::FailRequest(RequestId id, const absl::Status& error) {
  const auto it = requests_.find(id);
  SY_CHECK(it != requests_.end());
  // End() of the last live choice erases the request.
  for (int32_t left = it->second.live, choice = 0; left > 0; ++choice) {
    Sequence* sequence = it->second.choices[choice].get();
    if (sequence == nullptr) continue;
    --left;
    ChoiceEvent& event = EventOf(*sequence);
    event.finished = true;
    event.reason = FinishReason::kError;
    event.error = error;
    End(*sequence);
  }
}

void SchedulerCore::EndAll(const absl::Status& error) {
  std::vector<RequestId> ids;
  for (const auto& [id, state] : requests_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  for (RequestId id : ids) FailRequest(id, error);
  FlushEvents();
}

ChoiceEvent& SchedulerCore::EventOf(const Sequence& sequence) {
  Delivery& delivery = events_[sequence.request()];
  if (!delivery.request) delivery.request = requests_.at(sequence.request()).request;
  for (ChoiceEvent& event : delivery.events) {
    if (event.choice == sequence.choice()) return event;
  }
  ChoiceEvent& event = delivery.events.emplace_back();
  event.request = sequence.request();
  event.choice = sequence.choice();
  event.cached_tokens = std::min(sequence.cached_tokens, sequence.prompt_length());
  event.first_scheduled = sequence.first_scheduled;
  event.prefill_done = sequence.prefill_done;
  return event;
}

void SchedulerCore::FlushEvents() {
  for (auto& [id, delivery] : std::exchange(events_, {})) {
    if (!delivery.events.empty()) deliveries_.push_back(std::move(delivery));
  }
}

}  // namespace switchyard
