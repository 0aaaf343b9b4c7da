#include "worker/attention_worker.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/float_mode.h"

namespace switchyard {
namespace {

TokenLogprob ToLogprob(int32_t token, SampledToken sampled) {
  return {.token = token, .logprob = sampled.logprob, .top = std::move(sampled.top)};
}

}  // namespace

AttentionWorker::AttentionWorker(const AttentionWorkerOptions& options, const ModelConfig& config,
                                 std::shared_ptr<const AttentionWeights> weights,
                                 std::shared_ptr<const ExpertPlacement> placement,
                                 std::unique_ptr<ComputeBackend> backend, Callbacks callbacks)
    : options_(options),
      callbacks_(std::move(callbacks)),
      backend_(std::move(backend)),
      exchange_(options.exchange, weights->dtype, options.ranks, std::move(placement),
                options.planner, options.communicator),
      decoder_(config, std::move(weights), options.max_rows, options.limits.max_model_len,
               backend_.get(), options.kv, &exchange_, options_.counters.get()),
      table_(options.limits),
      queue_(options.pool),
      thread_([this] {
        const ThreadPool::Owner owner(options_.pool);
        Run();
      }) {}

AttentionWorker::~AttentionWorker() {
  queue_.Stop();
  thread_.join();
  options_.counters->steps.fetch_sub(static_cast<int64_t>(queue_.size()));
}

void AttentionWorker::Execute(StepPlan plan) {
  options_.counters->steps.fetch_add(1);
  queue_.Push(std::move(plan));
}

void AttentionWorker::Run() {
  const FlushDenormals flush;
  while (const std::optional<StepPlan> plan = queue_.Pop()) {
    StepResult result = RunStep(*plan);
    options_.counters->steps.fetch_sub(1);
    callbacks_.on_result(std::move(result));
  }
}

StepResult AttentionWorker::RunStep(const StepPlan& plan) {
  StepResult result{.epoch = plan.header.epoch,
                    .step = plan.header.step,
                    .worker = options_.index,
                    .error = "",
                    .fatal = false,
                    .results = {}};
  if (failed_.ok()) {
    const auto start = std::chrono::steady_clock::now();
    failed_ = ComputeStep(plan, &result);
    const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - start;
    result.step_ns = took.count();
    result.wait_ns = exchange_.TakeWaited().count();
    if (!failed_.ok()) {
      callbacks_.on_failure(failed_);  // first: a peer that finds this rank gone will blame it
      exchange_.Quit(failed_);
    }
  }
  if (!failed_.ok()) {
    result.results.clear();
    result.fatal = true;
    result.error =
        absl::StrCat("attention rank ", options_.index, ": ", std::string(failed_.message()));
  }
  return result;
}

absl::Status AttentionWorker::ComputeStep(const StepPlan& plan, StepResult* result) {
  if (absl::Status status = CheckParticipants(plan.header, options_.ranks); !status.ok())
    return status;
  if (!std::count(plan.header.participants.begin(), plan.header.participants.end(),
                  options_.index)) {
    return absl::InvalidArgumentError(
        absl::StrCat("step ", plan.header.step, " does not name this participant"));
  }
  if (absl::Status status = table_.Apply(plan); !status.ok()) return status;
  if (absl::Status status = BuildBatch(plan); !status.ok()) return status;
  if (absl::Status status = Forward(plan); !status.ok()) return status;
  options_.counters->rows.fetch_add(tokens_.size(), std::memory_order_relaxed);

  result->results.reserve(plan.work.size());
  for (const SequenceWork& work : plan.work) {
    SequenceResult& out = result->results.emplace_back();
    out.sequence = work.sequence;
    out.run = work.run;
    out.computed = work.start + work.count;
  }
  for (size_t i = 0; i < plan.work.size(); ++i) {
    ScorePrompt(plan.work[i], sequences_[i].first_row, &result->results[i]);
  }
  SampleTokens(plan, result);
  return absl::OkStatus();
}

absl::Status AttentionWorker::BuildBatch(const StepPlan& plan) {
  tokens_.clear();
  positions_.clear();
  profiles_.clear();
  sequences_.clear();
  for (const SequenceWork& work : plan.work) {
    const SequenceState& state = table_.Get(work.sequence);
    const size_t rows = tokens_.size() + static_cast<size_t>(work.count);
    if (rows > static_cast<size_t>(options_.max_rows)) {
      return absl::InvalidArgumentError(
          absl::StrCat("step ", plan.header.step, " has more than ", options_.max_rows, " rows"));
    }
    sequences_.push_back({.block_table = state.block_table,
                          .start_position = work.start,
                          .first_row = static_cast<int32_t>(tokens_.size()),
                          .num_rows = work.count});
    const auto first = state.tokens.begin() + work.start;
    tokens_.insert(tokens_.end(), first, first + work.count);
    profiles_.resize(rows, state.sampling->routing_profile);
    for (int32_t p = work.start; p < work.start + work.count; ++p) positions_.push_back(p);
  }
  if (tokens_.empty())
    return absl::InvalidArgumentError(absl::StrCat("step ", plan.header.step, " has no rows"));
  return absl::OkStatus();
}

absl::Status AttentionWorker::Forward(const StepPlan& plan) {
  RoutingRecorder* const recorder = options_.recorder;
  const DecoderBatch batch{.tokens = tokens_,
                           .positions = positions_,
                           .routing_profiles = profiles_,
                           .sequences = sequences_,
                           .record = recorder != nullptr ? recorder->Begin(plan.work) : nullptr};
  absl::Status status = decoder_.Forward(plan.header, batch);
  if (batch.record != nullptr && status.ok()) recorder->Commit(batch.record);
  if (batch.record != nullptr && !status.ok()) recorder->Discard(batch.record);
  return status;
}

SamplingRow AttentionWorker::MakeSamplingRow(const SequenceWork& work) {
  const SequenceState& state = table_.Get(work.sequence);
  const SamplingParams& sampling = *state.sampling;
  const int32_t length = work.start + work.count;
  const int32_t prompt = std::min(state.prompt_length, length);
  const std::span<const int32_t> tokens =
      std::span(state.tokens).first(static_cast<size_t>(length));
  return {.temperature = sampling.temperature,
          .top_p = sampling.top_p,
          .min_p = sampling.min_p,
          .top_k = sampling.top_k,
          .presence_penalty = sampling.presence_penalty,
          .frequency_penalty = sampling.frequency_penalty,
          .repetition_penalty = sampling.repetition_penalty,
          .prompt = tokens.first(static_cast<size_t>(prompt)),
          .generated = tokens.subspan(static_cast<size_t>(prompt)),
          .logit_bias = sampling.logit_bias,
          .banned = length - prompt < sampling.min_tokens
                        ? std::span<const int32_t>(sampling.banned_before_min)
                        : std::span<const int32_t>(),
          .seed = sampling.seed,
          .choice = sampling.choice,
          .position = length,
          .num_top_logprobs = sampling.num_logprobs};
}

void AttentionWorker::SampleTokens(const StepPlan& plan, StepResult* result) {
  std::array<int32_t, Decoder::kMaxLogitsRows> rows;
  std::array<size_t, Decoder::kMaxLogitsRows> works;
  for (size_t next = 0; next < plan.work.size();) {
    sampling_.clear();
    size_t count = 0;
    for (; next < plan.work.size() && count < rows.size(); ++next) {
      if (!plan.work[next].sample) continue;
      rows[count] = sequences_[next].first_row + sequences_[next].num_rows - 1;
      works[count++] = next;
      sampling_.push_back(MakeSamplingRow(plan.work[next]));
    }
    if (count == 0) return;
    sampled_.assign(count, {});
    const std::span<const int32_t> picked = std::span(rows).first(count);
    if (std::ranges::all_of(sampling_, &SamplingRow::IsArgmax)) {
      decoder_.Argmax(picked, sampled_);
    } else {
      backend_->Sample(decoder_.Logits(picked), sampling_, sampled_);
    }
    backend_->Synchronize();
    for (size_t i = 0; i < count; ++i) {
      const SequenceWork& work = plan.work[works[i]];
      SequenceResult& out = result->results[works[i]];
      out.finite = out.finite && sampled_[i].finite;
      if (sampled_[i].finite) out.token = sampled_[i].token;
      // The next step may ask for this position before the scheduler has told us its token, or has
      // heard that the sequence has failed.
      SequenceState& state = table_.Get(work.sequence);
      const size_t position = static_cast<size_t>(work.start + work.count);
      if (position < static_cast<size_t>(options_.limits.max_model_len)) {
        if (state.tokens.size() <= position)
          state.tokens.resize(position + 1, SequenceTable::kUnknownToken);
        state.tokens[position] = std::max(out.token, 0);
      }
      if (sampled_[i].finite && state.sampling->num_logprobs >= 0)
        out.logprob = ToLogprob(out.token, std::move(sampled_[i]));
    }
  }
}

void AttentionWorker::ScorePrompt(const SequenceWork& work, int32_t first_row,
                                  SequenceResult* result) {
  const SequenceState& state = table_.Get(work.sequence);
  if (state.sampling->num_prompt_logprobs < 0) return;
  // Position p scores the prompt's token at p + 1.
  const int32_t begin = std::max(work.start, state.first_unscored - 1);
  const int32_t end = std::min(work.start + work.count, state.prompt_length - 1);
  result->prompt_logprobs_start = begin + 1;
  std::array<int32_t, Decoder::kMaxLogitsRows> rows;
  std::vector<SampledToken> scored;
  for (int32_t p = begin; p < end;) {
    const int32_t count = std::min<int32_t>(end - p, static_cast<int32_t>(rows.size()));
    for (int32_t i = 0; i < count; ++i)
      rows[static_cast<size_t>(i)] = first_row + p - work.start + i;
    const std::span<const int32_t> targets =
        std::span(state.tokens).subspan(static_cast<size_t>(p) + 1, static_cast<size_t>(count));
    scored.assign(static_cast<size_t>(count), {});
    const Tensor logits = decoder_.Logits(std::span(rows).first(static_cast<size_t>(count)));
    backend_->Score(logits, targets, state.sampling->num_prompt_logprobs, scored);
    backend_->Synchronize();
    for (size_t i = 0; i < scored.size(); ++i) {
      result->finite = result->finite && scored[i].finite;
      result->prompt_logprobs.push_back(ToLogprob(targets[i], std::move(scored[i])));
    }
    p += count;
  }
}

}  // namespace switchyard
