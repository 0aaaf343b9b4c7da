// BatchRun: batches of random, distinct sequences that drive a LocalCell step by step, without
// server or scheduler: all prompts, then one token of every sequence at a time. Knows what each
// step read and multiplied. Used by benchmarks, on one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/mutex.h"
#include "worker/local_cell.h"

namespace switchyard {

// Sends the plans of a step and waits for its results.
class StepRunner {
 public:
  // Takes the cell's result callback. The cell must outlive the runner's last Run.
  explicit StepRunner(LocalCell* cell);
  // One plan per attention worker; empty ones are not sent.
  absl::StatusOr<std::vector<SequenceResult>> Run(std::vector<StepPlan> plans);

 private:
  LocalCell* const cell_;
  uint64_t step_ = 0;
  Mutex mu_;
  CondVar changed_;
  std::vector<StepResult> results_ SY_GUARDED_BY(mu_);
};

// Blocks are given out from zero, so batches follow one another in the cell.
class BatchRun {
 public:
  BatchRun(LocalCell* cell, StepRunner* runner, int32_t max_rows);

  // Forgets the batch before; its sequences end with the next step.
  void Start(int batch, int prompt_tokens, std::mt19937_64& random);
  absl::Status Prefill();
  // One token of every sequence, in as many steps as the row limit needs.
  absl::Status DecodeOnce();

  // Bytes that reading each weight needed since Start once a step takes: attention, router, dense
  // and shared layers, lm_head, and the experts that had rows, in their stored format, plus the
  // keys and values of all positions seen.
  int64_t bytes_read() const { return bytes_read_; }
  // Floating-point operations since Start, a multiply-add being two: of all products with weights,
  // and of the scores and values of attention.
  double flops() const { return flops_; }

 private:
  struct BenchSequence {
    SequenceId id = 0;
    int worker = 0;
    std::shared_ptr<const SequenceStart> start;
    int32_t computed = 0;
    int32_t num_blocks = 0;
    int32_t last_token = -1;  // sampled at position `computed`; -1 during prefill
  };

  std::vector<StepPlan> NewPlans() const;
  void AddWork(BenchSequence& s, int32_t count, bool sample, std::vector<StepPlan>* plans);
  absl::Status RunStep(std::vector<StepPlan> plans);
  void CountAttention(const std::vector<StepPlan>& plans);
  void CountExperts();

  LocalCell* const cell_;
  StepRunner* const runner_;
  const int32_t max_rows_;
  SequenceId next_id_ = 1;
  std::vector<BenchSequence> sequences_;
  std::vector<int32_t> next_block_;              // per attention worker
  std::vector<std::vector<SequenceEnd>> ended_;  // per attention worker
  std::vector<std::vector<uint64_t>> copies_;    // per expert worker: counters seen
  const int64_t attention_bytes_;                // read by an attention worker in every step
  const double row_flops_;                       // of a row's products on the attention side
  int64_t bytes_read_ = 0;
  double flops_ = 0.0;
};

}  // namespace switchyard
