#include "worker/batch_run.h"

#include <algorithm>

namespace switchyard {
namespace {

int64_t Bytes(const PackedMatrix& matrix) { return static_cast<int64_t>(matrix.storage.bytes()); }
int64_t Bytes(const MlpWeights& mlp) { return Bytes(mlp.gate_up) + Bytes(mlp.down); }

// The matrices that an attention worker needs for every row, with those of its layers' MLPs.
template <typename Fn>
void ForEachMatrix(const AttentionWeights& weights, const Fn& fn) {
  for (const AttentionLayerWeights& layer : weights.layers) {
    for (const PackedMatrix* m :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.router, &layer.shared_gate,
          &layer.dense.gate_up, &layer.dense.down, &layer.shared.gate_up, &layer.shared.down}) {
      fn(*m);
    }
  }
}

int64_t BytesOfStep(const AttentionWeights& weights) {
  int64_t bytes = Bytes(weights.lm_head);
  ForEachMatrix(weights, [&](const PackedMatrix& m) { bytes += Bytes(m); });
  return bytes;
}

double Flops(const PackedMatrix& matrix) {
  return 2.0 * static_cast<double>(matrix.n) * static_cast<double>(matrix.k);
}

double FlopsOfRow(const AttentionWeights& weights) {
  double flops = 0.0;
  ForEachMatrix(weights, [&](const PackedMatrix& m) { flops += Flops(m); });
  return flops;
}

}  // namespace

StepRunner::StepRunner(LocalCell* cell) : cell_(cell) {
  cell->SetResultCallback([this](StepResult result) {
    MutexLock lock(mu_);
    results_.push_back(std::move(result));
    changed_.NotifyAll();
  });
}

absl::StatusOr<std::vector<SequenceResult>> StepRunner::Run(std::vector<StepPlan> plans) {
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

BatchRun::BatchRun(LocalCell* cell, StepRunner* runner, int32_t max_rows)
    : cell_(cell),
      runner_(runner),
      max_rows_(max_rows),
      ended_(static_cast<size_t>(cell->num_attention_workers())),
      attention_bytes_(BytesOfStep(cell->attention_weights())),
      row_flops_(FlopsOfRow(cell->attention_weights())) {
  for (int e = 0; e < cell->num_expert_workers(); ++e)
    copies_.emplace_back(cell->expert_counters(e).expert_copies.size(), 0);
}

void BatchRun::Start(int batch, int prompt_tokens, std::mt19937_64& random) {
  for (const BenchSequence& s : sequences_) ended_[static_cast<size_t>(s.worker)].push_back({s.id});
  auto sampling = std::make_shared<SamplingParams>();
  sampling->temperature = 0.0f;
  sequences_.clear();
  bytes_read_ = 0;
  flops_ = 0.0;
  next_block_.assign(static_cast<size_t>(cell_->num_attention_workers()), 0);
  for (int i = 0; i < batch; ++i) {
    SequenceStart start{.tokens = {}, .prompt_length = prompt_tokens, .sampling = sampling};
    for (int t = 0; t < prompt_tokens; ++t) {
      start.tokens.push_back(
          static_cast<int32_t>(random() % static_cast<uint64_t>(cell_->model_info().vocab_size)));
    }
    BenchSequence& s = sequences_.emplace_back();
    s.id = next_id_++;
    s.worker = i % cell_->num_attention_workers();
    s.start = std::make_shared<SequenceStart>(std::move(start));
  }
}

absl::Status BatchRun::Prefill() {
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

absl::Status BatchRun::DecodeOnce() {
  for (size_t next = 0; next < sequences_.size();) {
    std::vector<StepPlan> plans = NewPlans();
    for (int32_t rows = 0; rows < max_rows_ && next < sequences_.size(); ++rows, ++next) {
      AddWork(sequences_[next], 1, true, &plans);
    }
    if (absl::Status status = RunStep(std::move(plans)); !status.ok()) return status;
  }
  return absl::OkStatus();
}

std::vector<StepPlan> BatchRun::NewPlans() const {
  return std::vector<StepPlan>(static_cast<size_t>(cell_->num_attention_workers()));
}

void BatchRun::AddWork(BenchSequence& s, int32_t count, bool sample, std::vector<StepPlan>* plans) {
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

absl::Status BatchRun::RunStep(std::vector<StepPlan> plans) {
  for (size_t w = 0; w < ended_.size(); ++w) {
    if (plans[w].work.empty()) continue;
    plans[w].ended = std::move(ended_[w]);
    ended_[w].clear();
  }
  CountAttention(plans);
  absl::StatusOr<std::vector<SequenceResult>> results = runner_->Run(std::move(plans));
  if (!results.ok()) return results.status();
  CountExperts();
  for (const SequenceResult& r : *results) {
    BenchSequence& s = sequences_[static_cast<size_t>(r.sequence - sequences_.front().id)];
    s.computed = r.computed;
    if (!r.finite) return absl::InternalError("the model's logits are not finite");
    if (r.token >= 0) s.last_token = r.token;
  }
  return absl::OkStatus();
}

void BatchRun::CountAttention(const std::vector<StepPlan>& plans) {
  const AttentionWeights& weights = cell_->attention_weights();
  for (const StepPlan& plan : plans) {
    if (!plan.work.empty()) bytes_read_ += attention_bytes_;
    for (const SequenceWork& work : plan.work) {
      const int64_t end = work.start + work.count;
      bytes_read_ += end * cell_->model_info().kv_bytes_per_token;
      // Row p sees p + 1 keys; a key's score and its value are head_dim multiply-adds each, a head.
      const double keys =
          0.5 * static_cast<double>(work.count) * static_cast<double>(work.start + end + 1);
      for (const AttentionLayerWeights& layer : weights.layers)
        flops_ += 4.0 * keys * static_cast<double>(layer.q.n);
      flops_ += row_flops_ * work.count + (work.sample ? Flops(weights.lm_head) : 0.0);
    }
  }
}

// Of the experts whose counters rose since the last call. A step's counters are final when its
// results are here.
void BatchRun::CountExperts() {
  const size_t num_experts = static_cast<size_t>(cell_->model_info().num_experts);
  for (size_t e = 0; e < copies_.size(); ++e) {
    const WorkerCounters& counters = cell_->expert_counters(static_cast<int>(e));
    const ExpertWeights& weights = cell_->expert_weights(static_cast<int>(e));
    for (size_t i = 0; i < copies_[e].size(); ++i) {
      const uint64_t before = copies_[e][i];
      copies_[e][i] = counters.expert_copies[i].load(std::memory_order_relaxed);
      const MlpWeights* mlp = weights.experts[i / num_experts][i % num_experts].get();
      if (copies_[e][i] == before || mlp == nullptr) continue;
      bytes_read_ += Bytes(*mlp);
      flops_ +=
          static_cast<double>(copies_[e][i] - before) * (Flops(mlp->gate_up) + Flops(mlp->down));
    }
  }
}

}  // namespace switchyard
