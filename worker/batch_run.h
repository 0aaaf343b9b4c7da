// BatchRun: batches of random, distinct sequences that drive a LocalCell step by step, without
// server or scheduler: all prompts, then one token of every sequence at a time. The next step is
// sent while one computes, as the scheduler does. Knows what the steps read and multiplied. Used by
// benchmarks, on one thread.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/mutex.h"
#include "worker/local_cell.h"

namespace switchyard {

// Blocks are given out from zero, so batches follow one another in the cell.
class BatchRun {
 public:
  // Takes the cell's result callback. The cell must outlive it, and run no step after it.
  BatchRun(LocalCell* cell, int32_t max_rows);
  ~BatchRun();  // waits for the steps in flight
  BatchRun(const BatchRun&) = delete;
  BatchRun& operator=(const BatchRun&) = delete;

  // Forgets the batch before; its sequences end with the next step.
  void Start(int batch, int prompt_tokens, std::mt19937_64& random);
  absl::Status Prefill();
  // `tokens` tokens of every sequence, each in as many steps as the row limit needs. Appends how
  // long each took: from the results of the one before to its own.
  absl::Status Decode(int tokens, std::vector<double>* seconds);

  // Bytes that reading each weight once a step takes, since Start: attention, router, dense and
  // shared layers, lm_head, and the experts that had rows, in their stored format, plus the keys
  // and values of all positions seen.
  int64_t bytes_read() const { return bytes_read_; }
  // Floating-point operations since Start, a multiply-add being two: of all products with weights,
  // and of the scores and values of attention.
  double flops() const { return flops_; }

 private:
  struct BenchSequence {
    SequenceId id = 0;
    int worker = 0;
    std::shared_ptr<const SequenceStart> start;
    int32_t computed = 0;  // once the steps in flight are done
    int32_t num_blocks = 0;
  };
  struct Flight {
    uint64_t step = 0;
    size_t results = 0;  // that are to come
  };
  static constexpr size_t kMaxFlights = 2;  // as the scheduler's

  std::vector<StepPlan> NewPlans() const;
  void AddWork(BenchSequence& s, int32_t count, bool sample, std::vector<StepPlan>* plans);
  // Waits for the oldest step where too many are in flight.
  absl::Status Send(std::vector<StepPlan> plans);
  absl::Status Collect();  // the oldest step in flight
  absl::Status CollectAll();
  void CountAttention(const std::vector<StepPlan>& plans);
  void CountExperts();

  LocalCell* const cell_;
  const int32_t max_rows_;
  SequenceId next_id_ = 1;
  std::vector<BenchSequence> sequences_;
  std::vector<int32_t> next_block_;              // per attention worker
  std::vector<std::vector<SequenceEnd>> ended_;  // per attention worker
  std::vector<uint64_t> copies_;                 // per expert worker: counters seen
  std::vector<uint64_t> expert_bytes_;           // the same
  const int64_t attention_bytes_;                // read by an attention worker in every step
  const double row_flops_;                       // of a row's products on the attention side
  const double copy_flops_;                      // of a row in an expert
  int64_t bytes_read_ = 0;
  double flops_ = 0.0;
  uint64_t step_ = 0;
  std::deque<Flight> flights_;

  Mutex mu_;
  CondVar changed_;
  std::vector<StepResult> results_ SY_GUARDED_BY(mu_);
};

}  // namespace switchyard
