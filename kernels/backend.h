// ComputeBackend: the maths of a decoder, each op declared and checked once; CPU now, CUDA as a
// faster equal. One backend belongs to one rank and is used by that rank's owner thread only.
// Ops are enqueued in call order and are done after Synchronize(); on the CPU each call returns
// when it is done. No op knows models, requests or ranks.
//
// Equal bits: every op computes each row from that row alone, in an order that depends neither on
// the number of rows nor on threads (DESIGN.md section 1). "act" below is the activation type,
// float32 or bfloat16. Where weights are quantised, so are the activations inside the op: int8 with
// one scale per row and 128 inputs, products exact within a group of weights.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/routing_policy.h"
#include "kernels/tensor.h"
#include "kernels/weight_format.h"

namespace switchyard {

// kF32 or kBF16.
constexpr WeightFormat FormatOf(DType dtype) {
  return {.type = dtype == DType::kBF16 ? WeightType::kBF16 : WeightType::kF32};
}
// "float32", "bfloat16", "int8/128", "int4/32", "int4/128/zero": with the group, and whether there
// are zero points.
std::string WeightFormatName(const WeightFormat& format);

// A weight matrix [n, k] in the back end's own layout. Immutable after packing; may be read by many
// threads.
struct PackedMatrix {
  int64_t n = 0;  // output features
  int64_t k = 0;  // input features
  WeightFormat format = {};
  Buffer storage;
};

// Weights that a checkpoint keeps as integers: w[j, i] = scales[j, g] * (codes[j, i] - zero), where
// g = i / group and zero = zeros[j, g], or 128 (kInt8) or 8 (kInt4) without zeros.
struct QuantizedTensor {
  int64_t n = 0, k = 0;
  WeightFormat format;             // kInt8 or kInt4; its group: a multiple of 32, or at least k
  std::span<const uint8_t> codes;  // [n, k], one a byte
  std::span<const float> scales;   // [n, ceil(k / group)], kept as float16: the nearest one
  std::span<const uint8_t> zeros;  // [n, ceil(k / group)], empty without zero_points
};

// One gated MLP: out = down( silu(gate·x) * (up·x) ). Widths may differ between experts.
struct MlpWeights {
  PackedMatrix gate_up;  // [2 * width, hidden]: panels of gate and up as the back end likes them
  PackedMatrix down;     // [hidden, width]
  int64_t width = 0;
};

// Rows [begin, end) of a batch go through one expert.
struct MlpGroup {
  const MlpWeights* weights = nullptr;
  int64_t begin = 0;
  int64_t end = 0;
};

// One layer's paged KV cache. Block b holds positions [b*block_size, …) of a sequence. The layout
// inside a block is the back end's: KvBlockBytes() says how many bytes a block of one layer takes.
struct KvCacheShape {
  int num_blocks = 0;
  int block_size = 0;  // divides 256, the attention split
  int num_kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kF32;
};

// The rows [first_row, first_row + num_rows) of a batch belong to one sequence and sit at positions
// start_position, ….
struct SequenceRows {
  std::span<const int32_t> block_table;  // covers positions [0, start_position + num_rows)
  int32_t start_position = 0;
  int32_t first_row = 0;
  int32_t num_rows = 0;
};

struct AttentionArgs {
  Tensor q;  // [rows, num_heads, head_dim] float32, RoPE applied
  const Tensor* kv =
      nullptr;  // this layer's cache: [num_blocks * KvBlockBytes] as bytes (kI32 view)
  KvCacheShape shape;
  std::span<const SequenceRows> sequences;
  float scale = 1.0f;
  Tensor out;  // [rows, num_heads * head_dim] act
};

// What the sampler needs to draw one token from one row of logits; all derived from the plan and
// the token ids.
struct SamplingRow {
  // Temperatures below this are greedy.
  static constexpr float kGreedyTemperature = 1e-5f;

  // Whether anything changes the logits before a token is chosen.
  bool Adjusts() const {
    return !logit_bias.empty() || !banned.empty() || repetition_penalty != 1.0f ||
           presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }
  // Whether the highest logit's id is all that is asked for.
  bool IsArgmax() const {
    return temperature < kGreedyTemperature && !Adjusts() && num_top_logprobs < 0;
  }

  float temperature = 1.0f;  // 0: greedy
  float top_p = 1.0f;
  float min_p = 0.0f;
  int32_t top_k = 0;  // 0: off
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;
  std::span<const int32_t> prompt;     // token ids, for the repetition penalty
  std::span<const int32_t> generated;  // token ids so far, for all three penalties
  std::span<const std::pair<int32_t, float>> logit_bias;
  std::span<const int32_t> banned;  // ids that must not be drawn (stop ids below min_tokens)
  uint64_t seed = 0;
  uint32_t choice = 0;
  int64_t position = 0;           // of the token to be drawn
  int32_t num_top_logprobs = -1;  // -1: no logprobs at all; 0: only the chosen token's
};

struct SampledToken {
  int32_t token = -1;
  bool finite = true;    // false: logits held a NaN or all were -inf; token is then -1
  float logprob = 0.0f;  // log softmax of the raw logits (before bias, penalties and temperature)
  std::vector<std::pair<int32_t, float>>
      top;  // the highest raw logprobs, descending, ties to the lower id
};

// The largest calls that a worker makes of a back end. Zero: that op is never called.
struct ScratchLimits {
  DType act = DType::kF32;
  int64_t matmul_rows = 0;
  int64_t matmul_k = 0;  // input features
  int64_t mlp_rows = 0;  // of GroupedMlp, all groups together
  int64_t mlp_hidden = 0;
  int64_t mlp_width = 0;
  int64_t attention_rows = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 1;
  int64_t head_dim = 0;
  int64_t max_positions = 0;   // of a sequence
  int64_t combine_hidden = 0;  // of Combine
  int64_t vocab_size = 0;      // of Sample and Score
};

// Upper bounds of what a back end allocates besides the caller's buffers.
struct ScratchBytes {
  int64_t backend = 0;     // of this back end
  int64_t per_thread = 0;  // of every thread that computes, for all back ends of the process
};

class ComputeBackend {
 public:
  virtual ~ComputeBackend() = default;

  // (back end, instruction path, numerics version), e.g. "cpu/avx2/1": equal ids promise equal
  // bits.
  virtual std::string numerics_id() const = 0;

  // What calls within `limits` may allocate.
  virtual ScratchBytes MaxScratch(const ScratchLimits& limits) const = 0;
  // Allocates ScratchBytes::backend of it now rather than as calls grow.
  virtual void Reserve(const ScratchLimits& limits) = 0;

  // Packs row-major [n, k] float32 or bfloat16. kF32 and kBF16 are for weights of that type; kInt8
  // and kInt4 quantise here, without zero points.
  virtual PackedMatrix Pack(const Tensor& weight, const WeightFormat& format) = 0;
  // The same values (scales rounded to float16). Groups of the source that are neither 32 nor 128
  // are cut into such with equal scales.
  virtual PackedMatrix Pack(const QuantizedTensor& weight) = 0;
  // gate, up: [width, hidden]; down: [hidden, width].
  virtual MlpWeights PackMlp(const Tensor& gate, const Tensor& up, const Tensor& down,
                             const WeightFormat& format) = 0;
  // REQUIRES: gate and up have one format.
  virtual MlpWeights PackMlp(const QuantizedTensor& gate, const QuantizedTensor& up,
                             const QuantizedTensor& down) = 0;
  // Room for a packed MLP of this shape: the bytes of another one's gate_up and down may be copied
  // into it, also from another back end of the same numerics_id. What it holds is not defined.
  virtual MlpWeights MakeMlp(int64_t width, int64_t hidden, const WeightFormat& format) = 0;
  // Bytes of a packed matrix [n, k].
  virtual size_t PackedBytes(int64_t n, int64_t k, const WeightFormat& format) const = 0;

  // table: [vocab, hidden] float32 or bfloat16; out: [rows, hidden] float32. REQUIRES: 0 <= id <
  // vocab.
  virtual void Embed(const Tensor& table, std::span<const int32_t> ids, const Tensor& out) = 0;

  // x: [rows, dim] float32; weight: [dim] float32; out: [rows, dim] float32 or act; out may alias x
  // when float32. RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight.
  virtual void RmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) = 0;

  // out[r, j] = sum_k x[r, k] * w[j, k] (+ bias[j]), for every product. x: [rows, k] of w's type,
  // or act where w is quantised.
  struct Product {
    const PackedMatrix* w = nullptr;  // [n, k]
    const float* bias = nullptr;      // [n] float32 or null
    Tensor out;                       // [rows, n] float32 or act
  };
  virtual void Matmul(const Tensor& x, std::span<const Product> products) = 0;
  void Matmul(const Tensor& x, const PackedMatrix& w, const float* bias, const Tensor& out) {
    const Product product{.w = &w, .bias = bias, .out = out};
    Matmul(x, {&product, 1});
  }

  // Rotary embedding in place, half-split pairs (i, i + rotary_dim/2) as in GPT-NeoX; dims beyond
  // rotary_dim pass. x: [rows, heads, head_dim] float32; cos, sin: [max_positions, rotary_dim/2]
  // float32; positions: [rows].
  virtual void Rope(const Tensor& x, const Tensor& cos, const Tensor& sin,
                    std::span<const int32_t> positions) = 0;

  // Bytes of one block (keys and values of all kv heads) of one layer.
  virtual size_t KvBlockBytes(const KvCacheShape& shape) const = 0;
  // k, v: [rows, num_kv_heads, head_dim] float32, written at the sequences' positions.
  virtual void WriteKv(const Tensor& k, const Tensor& v, const KvCacheShape& shape,
                       std::span<const SequenceRows> sequences, const Tensor& kv) = 0;
  // Causal attention over the paged cache, grouped-query; splits of 256 positions merged in
  // ascending order.
  virtual void Attention(const AttentionArgs& args) = 0;

  // x, out: [rows, hidden] act, which is the weights' type unless they are quantised; formats may
  // differ between groups. The groups cover disjoint row ranges; out rows outside all groups are
  // left alone.
  virtual void GroupedMlp(const Tensor& x, std::span<const MlpGroup> groups, const Tensor& out) = 0;

  // residual [rows, hidden] float32 += sum_j weights[r, j] * expert_rows[row_of[r * top_k + j]], j
  // ascending, summed in float32 before it is added (after `shared` [rows, hidden] act, scaled by
  // shared_gate [rows] float32; either may be null). row_of < 0 means no such expert. Order: routed
  // sum, then shared expert, then residual (DESIGN.md section 1).
  struct CombineArgs {
    Tensor residual;
    const Tensor* expert_rows = nullptr;  // [num_rows, hidden] act
    std::span<const int32_t> row_of;      // [rows * top_k]
    std::span<const float> weights;       // [rows * top_k]
    int32_t top_k = 0;
    const Tensor* shared = nullptr;
    const float* shared_gate = nullptr;  // sigmoid already applied
  };
  virtual void Combine(const CombineArgs& args) = 0;

  // residual [rows, hidden] float32 += x [rows, hidden] float32 or act.
  virtual void Add(const Tensor& x, const Tensor& residual) = 0;
  // x [n] float32 in place: 1 / (1 + exp(-x)).
  virtual void Sigmoid(const Tensor& x) = 0;

  // logits: [rows, vocab] float32, one SamplingRow per row. Counter-based random numbers keyed by
  // (seed, choice, position, draw).
  virtual void Sample(const Tensor& logits, std::span<const SamplingRow> rows,
                      std::span<SampledToken> out) = 0;
  // What Sample gives for rows that are IsArgmax() of the logits x * w^T, which are not written to
  // memory. x: [rows, k] as Matmul takes it; w: [vocab, k].
  virtual void MatmulArgmax(const Tensor& x, const PackedMatrix& w,
                            std::span<SampledToken> out) = 0;
  // Raw logprobs of given tokens (prompt logprobs): target[r] scored from logits row r; num_top as
  // in SamplingRow.
  virtual void Score(const Tensor& logits, std::span<const int32_t> target, int32_t num_top,
                     std::span<SampledToken> out) = 0;

  virtual void Synchronize() = 0;
};

class ThreadPool;

// "auto" takes the best path of this CPU; "avx512" (AVX-512 with BF16 and VNNI), "avx2" or
// "portable" force one. Null, with `error` set, when the CPU lacks it. The pool must outlive the
// backend.
std::unique_ptr<ComputeBackend> MakeCpuBackend(ThreadPool* pool, const std::string& isa,
                                               std::string* error);
// The paths this CPU can run, best first.
std::vector<std::string> CpuIsaPaths();

}  // namespace switchyard
