// Decoder: the forward pass of an attention worker's rows through all layers, from token ids to
// logits. It reads a description (ModelConfig) and weights, and calls the back end; rows of MoE
// layers travel through the MoeExchange. With two micro-batches the rows of one are computed while
// those of the other are at the experts:
//
//   attention(l,0) dispatch(l,0) | attention(l,1) dispatch(l,1) | results(l,0) attention(l+1,0) …
//
// Rows are cut anywhere, also within a prefill chunk: keys and values of a layer are written in the
// order of the positions. All buffers are allocated at construction. Owned by one
// attention worker, used on its thread only.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/routing_policy.h"
#include "proto/step_plan.h"
#include "worker/kv_cache.h"
#include "worker/model_config.h"
#include "worker/moe_exchange.h"
#include "worker/routing_recorder.h"
#include "worker/weights.h"
#include "worker/worker_counters.h"

namespace switchyard {

// The rows of one step, sequence after sequence.
struct DecoderBatch {
  std::span<const int32_t> tokens;             // [rows]
  std::span<const int32_t> positions;          // [rows]
  std::span<const uint32_t> routing_profiles;  // [rows]
  std::span<const SequenceRows> sequences;
  RoutingRecord* record = nullptr;  // gets every MoE layer's choices; null: nobody records them
  int64_t num_rows() const { return static_cast<int64_t>(tokens.size()); }
};

class Decoder {
 public:
  // Logits are computed for at most this many rows at a time.
  static constexpr int64_t kMaxLogitsRows = 64;

  // `backend`, `kv`, `exchange` and `counters` must outlive it.
  Decoder(const ModelConfig& config, std::shared_ptr<const AttentionWeights> weights,
          int32_t max_rows, int32_t max_model_len, ComputeBackend* backend, KvCache* kv,
          MoeExchange* exchange, WorkerCounters* counters);

  // Bytes of its work space.
  static int64_t WorkspaceBytes(const ModelConfig& config, DType act, int32_t max_rows);
  // The largest calls that it makes of its back end.
  static ScratchLimits MaxCalls(const ModelConfig& config, DType act, int32_t max_rows,
                                int32_t max_model_len);

  // Runs all layers. REQUIRES: 1 <= num_rows <= max_rows. Errors are those of the exchange.
  absl::Status Forward(const StepHeader& step, const DecoderBatch& batch);
  // Final norm and lm_head of some rows of the last Forward: [rows.size(), vocab] float32, valid
  // until the next call. REQUIRES: 1 <= rows.size() <= kMaxLogitsRows.
  Tensor Logits(std::span<const int32_t> rows);
  // What rows that are SamplingRow::IsArgmax() ask for, of such rows of the last Forward.
  // REQUIRES: as Logits; out.size() == rows.size().
  void Argmax(std::span<const int32_t> rows, std::span<SampledToken> out);

 private:
  // The rows, normed: [rows.size(), hidden] act.
  Tensor FinalNorm(std::span<const int32_t> rows);

  // Rows [begin, begin + batch.num_rows()) of the step's batch.
  struct MicroBatch {
    int32_t index = 0;
    int64_t begin = 0;
    DecoderBatch batch;                   // its views
    std::vector<SequenceRows> sequences;  // first_row counts from `begin`
  };
  std::span<MicroBatch> Split(const StepHeader& step, const DecoderBatch& batch);

  // Of the rows of one micro-batch.
  void AttentionBlock(int64_t layer, const MicroBatch& micro);
  void Attention(int64_t layer, const MicroBatch& micro);
  void NormQueryKey(const AttentionLayerWeights& weights, int64_t rows, const Tensor& q,
                    const Tensor& k);
  void Dense(const AttentionLayerWeights& weights, const MicroBatch& micro);
  // A MoE layer: rows go out; later their results are added.
  absl::Status SendRows(const StepHeader& step, int32_t moe_layer,
                        const AttentionLayerWeights& weights, const MicroBatch& micro);
  absl::Status AddResults(const AttentionLayerWeights& weights, const MicroBatch& micro);
  void Route(const AttentionLayerWeights& weights, const MicroBatch& micro);
  Tensor Residual(const MicroBatch& micro) const;    // [rows, hidden] float32
  Tensor MlpOut(const MicroBatch& micro) const;      // [rows, hidden] act
  Tensor SharedGate(const MicroBatch& micro) const;  // [rows, 1] float32
  size_t Copies(const MicroBatch& micro) const;      // its part of expert_ids_, expert_weights_
  size_t FirstCopy(const MicroBatch& micro) const;

  // Constant after construction.
  const ModelConfig config_;
  const std::shared_ptr<const AttentionWeights> weights_;
  const DType act_;
  const int64_t max_rows_;
  ComputeBackend* const backend_;
  KvCache* const kv_;
  MoeExchange* const exchange_;
  const RoutingPolicy router_;
  WorkerCounters* const counters_;

  std::array<MicroBatch, kMaxMicroBatches> micro_batches_;  // of the step

  // Work space, [max_rows, …]. What is needed while rows are away is indexed by the step's rows,
  // the rest by those of the micro-batch that is being computed.
  Buffer residual_;                     // [rows, hidden] float32
  Buffer normed_;                       // [rows, hidden] act
  Buffer q_, k_, v_;                    // [rows, heads, head_dim] float32
  Buffer attended_;                     // [rows, num_heads * head_dim] act
  Buffer projected_;                    // [rows, hidden] float32
  Buffer mlp_out_;                      // [rows, hidden] act: dense layer or shared expert
  Buffer shared_gate_;                  // [rows, 1] float32
  Buffer router_logits_;                // [rows, num_experts] float32
  Buffer picked_;                       // [kMaxLogitsRows, hidden] float32
  Buffer picked_normed_;                // [kMaxLogitsRows, hidden] act
  Buffer logits_;                       // [kMaxLogitsRows, vocab] float32
  std::vector<int32_t> expert_ids_;     // [rows, top_k]
  std::vector<float> expert_weights_;   // [rows, top_k]
  std::vector<int32_t> expert_counts_;  // [rows]
  RoutingPolicy::Scratch router_scratch_;
};

}  // namespace switchyard
