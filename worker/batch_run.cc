#include "worker/batch_run.h"

#include <algorithm>
#include <chrono>

namespace switchyard {
namespace {

int64_t Bytes(const PackedMatrix& matrix) { return static_cast<int64_t>(matrix.storage.bytes()); }

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

// Of one row in one expert; all experts are of one width.
double FlopsOfCopy(const LocalCell& cell) {
  for (int e = 0; e < cell.num_expert_workers(); ++e) {
    for (const auto& layer : cell.expert_weights(e).experts) {
      for (const auto& mlp : layer) {
        if (mlp != nullptr) return Flops(mlp->gate_up) + Flops(mlp->down);
      }
    }
  }
  return 0.0;
}

double FlopsOfRow(const AttentionWeights& weights) {
  double flops = 0.0;
  ForEachMatrix(weights, [&](const PackedMatrix& m) { flops += Flops(m); });
  return flops;
}

}  // namespace

BatchRun::BatchRun(LocalCell* cell, int32_t max_rows)
    : cell_(cell),
      max_rows_(max_rows),
      ended_(static_cast<size_t>(cell->num_attention_workers())),
      copies_(static_cast<size_t>(cell->num_expert_workers())),
      expert_bytes_(static_cast<size_t>(cell->num_expert_workers())),
      attention_bytes_(BytesOfStep(cell->attention_weights())),
      row_flops_(FlopsOfRow(cell->attention_weights())),
      copy_flops_(FlopsOfCopy(*cell)) {
  cell->SetResultCallback([this](StepResult result) {
    {
      MutexLock lock(mu_);
      results_.push_back(std::move(result));
    }
    changed_.NotifyAll();
  });
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
    if (rows == 0) return CollectAll();
    if (absl::Status status = Send(std::move(plans)); !status.ok()) return status;
  }
}

absl::Status BatchRun::Decode(int tokens, std::vector<double>* seconds) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point last = Clock::now();
  const auto note_time = [&] {
    const Clock::time_point now = Clock::now();
    seconds->push_back(std::chrono::duration<double>(now - last).count());
    last = now;
  };
  std::deque<uint64_t> ends;  // of the tokens under way: the last step of each
  for (int t = 0; t < tokens; ++t) {
    for (size_t next = 0; next < sequences_.size();) {
      std::vector<StepPlan> plans = NewPlans();
      for (int32_t rows = 0; rows < max_rows_ && next < sequences_.size(); ++rows, ++next) {
        AddWork(sequences_[next], 1, true, &plans);
      }
      if (absl::Status status = Send(std::move(plans)); !status.ok()) return status;
      if (!ends.empty() && flights_.front().step > ends.front()) {
        note_time();
        ends.pop_front();
      }
    }
    ends.push_back(step_);
  }
  while (!flights_.empty()) {
    if (absl::Status status = Collect(); !status.ok()) return status;
    if (!flights_.empty() && flights_.front().step <= ends.front()) continue;
    note_time();
    ends.pop_front();
  }
  return CollectAll();
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
  work.block_table_start = s.num_blocks;
  for (; s.num_blocks * cell_->model_info().block_size < s.computed + count; ++s.num_blocks) {
    work.new_blocks.push_back(next_block_[static_cast<size_t>(s.worker)]++);
  }
  s.computed += count;
}

BatchRun::~BatchRun() {
  while (!flights_.empty()) (void)Collect();  // an error: nobody asks any more
}

absl::Status BatchRun::Send(std::vector<StepPlan> plans) {
  if (flights_.size() == kMaxFlights) {
    if (absl::Status status = Collect(); !status.ok()) return status;
  }
  CountAttention(plans);
  StepHeader header{.epoch = 0, .step = ++step_, .participants = {}};
  for (size_t w = 0; w < plans.size(); ++w) {
    if (plans[w].work.empty()) continue;
    header.participants.push_back(static_cast<int32_t>(w));
    plans[w].ended = std::move(ended_[w]);
    ended_[w].clear();
  }
  for (const int32_t w : header.participants) {
    plans[static_cast<size_t>(w)].header = header;
    cell_->Execute(w, std::move(plans[static_cast<size_t>(w)]));
  }
  flights_.push_back({.step = step_, .results = header.participants.size()});
  return absl::OkStatus();
}

absl::Status BatchRun::Collect() {
  absl::Status status;
  for (Flight& flight = flights_.front(); flight.results > 0; --flight.results) {
    StepResult result;
    {
      MutexLock lock(mu_);
      const auto of_flight = [&](const StepResult& r) { return r.step == flight.step; };
      auto found = results_.end();
      while ((found = std::ranges::find_if(results_, of_flight)) == results_.end())
        changed_.Wait(mu_);
      result = std::move(*found);
      results_.erase(found);
    }
    if (!result.error.empty()) status.Update(absl::InternalError(result.error));
    for (const SequenceResult& r : result.results) {
      if (!r.finite) status.Update(absl::InternalError("the model's logits are not finite"));
    }
  }
  flights_.pop_front();
  return status;
}

absl::Status BatchRun::CollectAll() {
  while (!flights_.empty()) {
    if (absl::Status status = Collect(); !status.ok()) return status;
  }
  CountExperts();
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

// What the experts' counters rose by since the last call. They are final when no step is in flight.
void BatchRun::CountExperts() {
  for (size_t e = 0; e < copies_.size(); ++e) {
    const WorkerCounters& counters = cell_->expert_counters(static_cast<int>(e));
    const uint64_t bytes = counters.weight_bytes_read.load(std::memory_order_relaxed);
    const uint64_t copies = counters.rows.load(std::memory_order_relaxed);
    bytes_read_ += static_cast<int64_t>(bytes - expert_bytes_[e]);
    flops_ += static_cast<double>(copies - copies_[e]) * copy_flops_;
    expert_bytes_[e] = bytes;
    copies_[e] = copies;
  }
}

}  // namespace switchyard
