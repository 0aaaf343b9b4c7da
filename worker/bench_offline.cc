#include "worker/bench_offline.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/bandwidth_probe.h"
#include "kernels/mutex.h"
#include "nlohmann/json.hpp"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kProbeBytes = size_t{512} << 20;  // far beyond any cache of these machines
constexpr int kProbeRepetitions = 5;
constexpr int kWarmUpTokens = 16;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// One sequence of a batch.
struct BenchSequence {
  SequenceId id = 0;
  int worker = 0;
  std::shared_ptr<const SequenceStart> start;
  int32_t computed = 0;
  int32_t num_blocks = 0;
  int32_t last_token = -1;  // sampled at position `computed`; -1 during prefill
};

// Runs steps of a cell and collects their results.
class StepRunner {
 public:
  explicit StepRunner(LocalCell* cell) : cell_(cell) {
    cell->SetResultCallback([this](StepResult result) {
      MutexLock lock(mu_);
      results_.push_back(std::move(result));
      changed_.NotifyAll();
    });
  }

  // One plan per attention worker; empty ones are not sent.
  absl::StatusOr<std::vector<SequenceResult>> Run(std::vector<StepPlan> plans) {
    StepHeader header{.epoch = 0, .step = ++step_, .participants = {}};
    for (size_t w = 0; w < plans.size(); ++w) {
      if (!plans[w].work.empty()) header.participants.push_back(static_cast<int32_t>(w));
    }
    for (int32_t w : header.participants) {
      plans[static_cast<size_t>(w)].header = header;
      cell_->Execute(w, std::move(plans[static_cast<size_t>(w)]));
    }
    MutexLock lock(mu_);
    while (results_.size() < header.participants.size()) changed_.Wait(mu_);
    std::vector<SequenceResult> all;
    std::string error;
    for (StepResult& result : results_) {
      if (!result.error.empty()) error = result.error;
      for (SequenceResult& r : result.results) all.push_back(std::move(r));
    }
    results_.clear();
    if (!error.empty()) return absl::InternalError(error);
    return all;
  }

 private:
  LocalCell* const cell_;
  uint64_t step_ = 0;
  Mutex mu_;
  CondVar changed_;
  std::vector<StepResult> results_ SY_GUARDED_BY(mu_);
};

// One batch: all prompts, then all outputs. Blocks are given out from zero, so batches follow one
// another in the cell.
class BatchRun {
 public:
  BatchRun(LocalCell* cell, StepRunner* runner, int32_t max_rows)
      : cell_(cell), runner_(runner), max_rows_(max_rows) {}

  void Start(int batch, int prompt_tokens, SequenceId first_id, std::mt19937_64& random) {
    auto sampling = std::make_shared<SamplingParams>();
    sampling->temperature = 0.0f;
    sequences_.clear();
    next_block_.assign(static_cast<size_t>(cell_->num_attention_workers()), 0);
    for (int i = 0; i < batch; ++i) {
      SequenceStart start{.tokens = {}, .prompt_length = prompt_tokens, .sampling = sampling};
      for (int t = 0; t < prompt_tokens; ++t) {
        start.tokens.push_back(
            static_cast<int32_t>(random() % static_cast<uint64_t>(cell_->model_info().vocab_size)));
      }
      BenchSequence& s = sequences_.emplace_back();
      s.id = first_id + static_cast<SequenceId>(i);
      s.worker = i % cell_->num_attention_workers();
      s.start = std::make_shared<SequenceStart>(std::move(start));
    }
  }

  absl::Status Prefill() {
    for (;;) {
      std::vector<StepPlan> plans = NewPlans();
      int32_t rows = 0;
      for (BenchSequence& s : sequences_) {
        const int32_t count = std::min(s.start->prompt_length - s.computed, max_rows_ - rows);
        if (count <= 0) continue;
        AddWork(s, count, s.computed + count == s.start->prompt_length, &plans);
        rows += count;
      }
      if (rows == 0) return absl::OkStatus();
      if (absl::Status status = RunStep(std::move(plans)); !status.ok()) return status;
    }
  }

  // One token of every sequence, in as many steps as the row limit needs.
  absl::Status DecodeOnce() {
    for (size_t next = 0; next < sequences_.size();) {
      std::vector<StepPlan> plans = NewPlans();
      for (int32_t rows = 0; rows < max_rows_ && next < sequences_.size(); ++rows, ++next) {
        AddWork(sequences_[next], 1, true, &plans);
      }
      if (absl::Status status = RunStep(std::move(plans)); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // Ids to forget, sent with the next step.
  void End() {
    ended_.resize(static_cast<size_t>(cell_->num_attention_workers()));
    for (const BenchSequence& s : sequences_)
      ended_[static_cast<size_t>(s.worker)].push_back({s.id});
  }

 private:
  std::vector<StepPlan> NewPlans() const {
    return std::vector<StepPlan>(static_cast<size_t>(cell_->num_attention_workers()));
  }

  void AddWork(BenchSequence& s, int32_t count, bool sample, std::vector<StepPlan>* plans) {
    SequenceWork& work = (*plans)[static_cast<size_t>(s.worker)].work.emplace_back();
    work.sequence = s.id;
    if (s.computed == 0) work.begin = s.start;
    work.start = s.computed;
    work.count = count;
    work.sample = sample;
    if (s.last_token >= 0) {
      work.token_start = s.computed;
      work.tokens = {s.last_token};
    }
    work.block_table_start = s.num_blocks;
    for (; s.num_blocks * cell_->model_info().block_size < s.computed + count; ++s.num_blocks) {
      work.new_blocks.push_back(next_block_[static_cast<size_t>(s.worker)]++);
    }
  }

  absl::Status RunStep(std::vector<StepPlan> plans) {
    for (size_t w = 0; w < ended_.size(); ++w) {
      if (plans[w].work.empty()) continue;
      plans[w].ended = std::move(ended_[w]);
      ended_[w].clear();
    }
    absl::StatusOr<std::vector<SequenceResult>> results = runner_->Run(std::move(plans));
    if (!results.ok()) return results.status();
    for (const SequenceResult& r : *results) {
      BenchSequence& s = sequences_[static_cast<size_t>(r.sequence - sequences_.front().id)];
      s.computed = r.computed;
      if (!r.finite) return absl::InternalError("the model's logits are not finite");
      if (r.token >= 0) s.last_token = r.token;
    }
    return absl::OkStatus();
  }

  LocalCell* const cell_;
  StepRunner* const runner_;
  const int32_t max_rows_;
  std::vector<BenchSequence> sequences_;
  std::vector<int32_t> next_block_;              // per attention worker
  std::vector<std::vector<SequenceEnd>> ended_;  // per attention worker
};

absl::Status CheckOptions(const BenchOfflineOptions& options) {
  constexpr int kMaxTokens = 1 << 24;
  if (options.prompt_tokens < 1 || options.prompt_tokens > kMaxTokens ||
      options.output_tokens < 1 || options.output_tokens > kMaxTokens || options.batches.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt tokens ", options.prompt_tokens, " and output tokens ",
                     options.output_tokens, " must be from 1 to ", kMaxTokens, ", batch sizes (",
                     options.batches.size(), " given) at least one"));
  }
  for (int batch : options.batches) {
    if (batch < 1 || batch > 1 << 16) {
      return absl::InvalidArgumentError(
          absl::StrCat("batch ", batch, " is not from 1 to ", 1 << 16));
    }
  }
  return absl::OkStatus();
}

// Every sequence of the largest batch must fit into the KV cache at once.
absl::Status CheckKv(const ModelInfo& model, int attention_workers, int batch, int length) {
  const int64_t per_worker = (batch + attention_workers - 1) / attention_workers;
  const int64_t blocks = per_worker * ((length + model.block_size - 1) / model.block_size);
  if (blocks <= model.num_kv_blocks) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "batch ", batch, " of ", length, " tokens needs ", blocks,
      " KV blocks per attention worker = ", blocks * model.block_size * model.kv_bytes_per_token,
      " bytes, but there are ", model.num_kv_blocks, " blocks"));
}

void Log(const BenchOfflineOptions& options, const std::string& line) {
  if (options.log) options.log(line);
}

}  // namespace

absl::StatusOr<BenchOfflineReport> BenchOffline(const BenchOfflineOptions& options) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  const int length = options.prompt_tokens + options.output_tokens;
  const int largest = *std::max_element(options.batches.begin(), options.batches.end());
  CellOptions cell_options = options.cell;
  if (cell_options.max_model_len == 0) cell_options.max_model_len = length;
  cell_options.max_num_seqs = largest;
  absl::StatusOr<std::unique_ptr<LocalCell>> cell = LocalCell::Create(cell_options);
  if (!cell.ok()) return cell.status();
  BenchOfflineReport report{.model = (*cell)->model_info(), .rows = {}};
  if (length > report.model.max_model_len) {
    return absl::InvalidArgumentError(absl::StrCat("prompt and output of ", length,
                                                   " tokens exceed max_model_len ",
                                                   report.model.max_model_len));
  }
  const int workers = (*cell)->num_attention_workers();
  if (absl::Status status = CheckKv(report.model, workers, largest, length); !status.ok())
    return status;

  Log(options, "measuring memory bandwidth");
  const double probe = ProbeReadBandwidth((*cell)->pool(), kProbeBytes, kProbeRepetitions);
  StepRunner runner(cell->get());
  BatchRun run(cell->get(), &runner, cell_options.max_num_batched_tokens);
  std::mt19937_64 random(options.seed);
  SequenceId next_id = 1;
  // A short run first: pages are touched and threads are up before the clock starts.
  run.Start(1, std::min(kWarmUpTokens, options.prompt_tokens), next_id++, random);
  absl::Status status = run.Prefill();
  for (int batch : options.batches) {
    if (!status.ok()) return status;
    run.End();
    Log(options, absl::StrCat("batch ", batch));
    run.Start(batch, options.prompt_tokens, next_id, random);
    next_id += static_cast<SequenceId>(batch);
    const Clock::time_point prefill_start = Clock::now();
    status = run.Prefill();
    const double prefill_seconds = SecondsSince(prefill_start);
    const Clock::time_point decode_start = Clock::now();
    for (int t = 1; t < options.output_tokens && status.ok(); ++t) status = run.DecodeOnce();
    const double decode_seconds = SecondsSince(decode_start);
    const double decoded = static_cast<double>(batch) * (options.output_tokens - 1);
    report.rows.push_back({.batch = batch,
                           .prompt_tokens = options.prompt_tokens,
                           .output_tokens = options.output_tokens,
                           .prefill_tokens_per_second =
                               static_cast<double>(batch) * options.prompt_tokens / prefill_seconds,
                           .decode_tokens_per_second = decoded > 0 ? decoded / decode_seconds : 0.0,
                           .probe_gb_per_second = probe});
  }
  if (!status.ok()) return status;
  return report;
}

std::string BenchOfflineReport::Text() const {
  std::string text = absl::StrFormat("%s %s %s\n%8s %8s %8s %16s %16s %12s\n", model.name,
                                     model.dtype, model.numerics_id, "batch", "prompt", "output",
                                     "prefill tok/s", "decode tok/s", "probe GB/s");
  for (const BenchOfflineRow& row : rows) {
    absl::StrAppend(
        &text, absl::StrFormat("%8d %8d %8d %16.2f %16.2f %12.2f\n", row.batch, row.prompt_tokens,
                               row.output_tokens, row.prefill_tokens_per_second,
                               row.decode_tokens_per_second, row.probe_gb_per_second));
  }
  return text;
}

std::string BenchOfflineReport::Json() const {
  nlohmann::ordered_json out;
  out["model"] = model.name;
  out["dtype"] = model.dtype;
  out["numerics_id"] = model.numerics_id;
  out["rows"] = nlohmann::ordered_json::array();
  for (const BenchOfflineRow& row : rows) {
    out["rows"].push_back({{"batch", row.batch},
                           {"prompt_tokens", row.prompt_tokens},
                           {"output_tokens", row.output_tokens},
                           {"prefill_tokens_per_second", row.prefill_tokens_per_second},
                           {"decode_tokens_per_second", row.decode_tokens_per_second},
                           {"probe_gb_per_second", row.probe_gb_per_second}});
  }
  return out.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace switchyard
