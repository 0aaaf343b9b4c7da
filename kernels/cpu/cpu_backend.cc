#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/sampler.h"
#include "kernels/float_mode.h"

namespace switchyard::cpu {
namespace {

constexpr int kNumericsVersion = 1;

bool IsActivation(DType t) { return t == DType::kF32 || t == DType::kBF16; }

// What Scratch() allocates for a request of `bytes`.
size_t Grown(size_t bytes) { return bytes + bytes / 4; }

std::byte* RowAt(const Tensor& t, int64_t row, int64_t width) {
  return static_cast<std::byte*>(t.data) + static_cast<size_t>(row * width) * DTypeSize(t.dtype);
}

}  // namespace

CpuBackend::CpuBackend(ThreadPool* pool, const KernelTable* kernels)
    : pool_(pool), kernels_(kernels) {}

std::string CpuBackend::numerics_id() const {
  return std::string("cpu/") + kernels_->name + "/" + std::to_string(kNumericsVersion);
}

std::byte* CpuBackend::Scratch(Buffer* buffer, size_t bytes) {
  if (buffer->bytes() < bytes) {
    *buffer = Buffer();  // the old one goes first
    *buffer = Buffer(Grown(bytes), Buffer::Pages::kNow);
  }
  return buffer->data();
}

CpuBackend::ScratchNeeds CpuBackend::NeedsOf(const ScratchLimits& limits) const {
  // Weights of the activations' type, or quantised: the format whose rows take the most.
  const auto packed = [&](int64_t rows, int64_t k) {
    size_t row_bytes = kernels_->packed_row_bytes(k, FormatOf(limits.act));
    for (WeightType type : {WeightType::kInt8, WeightType::kInt4})
      row_bytes = std::max(row_bytes, kernels_->packed_row_bytes(k, {type, 32}));
    return static_cast<size_t>(rows) * row_bytes;
  };
  return {.rows = std::max(packed(limits.matmul_rows, limits.matmul_k),
                           packed(limits.mlp_rows, limits.mlp_hidden)),
          .hidden = packed(limits.mlp_rows, limits.mlp_width),
          .attention = MaxSplitStateFloats(limits) * sizeof(float)};
}

void CpuBackend::Reserve(const ScratchLimits& limits) {
  const ScratchNeeds needs = NeedsOf(limits);
  Scratch(&packed_rows_, needs.rows);
  Scratch(&packed_hidden_, needs.hidden);
  Scratch(&attention_states_, needs.attention);
}

ScratchBytes CpuBackend::MaxScratch(const ScratchLimits& limits) const {
  const ScratchNeeds needs = NeedsOf(limits);
  return {.backend = static_cast<int64_t>(Grown(needs.rows) + Grown(needs.hidden) +
                                          Grown(needs.attention)),
          .per_thread = static_cast<int64_t>(
              MaxThreadStateBytes(limits) + SamplerScratchBytes(limits.vocab_size) +
              static_cast<size_t>(limits.combine_hidden) * sizeof(float))};
}

PackedMatrix CpuBackend::Pack(const Tensor& weight, const WeightFormat& format) {
  return PackPanels(*kernels_, pool_, std::array{weight}, format);
}

PackedMatrix CpuBackend::Pack(const QuantizedTensor& weight) {
  return PackPanels(pool_, std::array{weight});
}

MlpWeights CpuBackend::PackMlp(const Tensor& gate, const Tensor& up, const Tensor& down,
                               const WeightFormat& format) {
  SY_CHECK_EQ(down.dim(1), gate.dim(0));
  SY_CHECK_EQ(down.dim(0), gate.dim(1));
  return {.gate_up = PackPanels(*kernels_, pool_, std::array{gate, up}, format),
          .down = PackPanels(*kernels_, pool_, std::array{down}, format),
          .width = gate.dim(0)};
}

MlpWeights CpuBackend::PackMlp(const QuantizedTensor& gate, const QuantizedTensor& up,
                               const QuantizedTensor& down) {
  SY_CHECK_EQ(down.k, gate.n);
  SY_CHECK_EQ(down.n, gate.k);
  return {.gate_up = PackPanels(pool_, std::array{gate, up}),
          .down = PackPanels(pool_, std::array{down}),
          .width = gate.n};
}

MlpWeights CpuBackend::MakeMlp(int64_t width, int64_t hidden, const WeightFormat& format) {
  return {.gate_up = MakePanels(width, hidden, format, 2),
          .down = MakePanels(hidden, width, format, 1),
          .width = width};
}

size_t CpuBackend::PackedBytes(int64_t n, int64_t k, const WeightFormat& format) const {
  return MatrixBytes(NumPanels(n), k, format);
}

void CpuBackend::Embed(const Tensor& table, std::span<const int32_t> ids, const Tensor& out) {
  const int64_t hidden = table.dim(1);
  SY_CHECK_EQ(out.dim(0), static_cast<int64_t>(ids.size()));
  SY_CHECK_EQ(out.dim(1), hidden);
  float* to = out.as<float>();
  RunRows(out.dim(0), hidden, [&](int64_t r) {
    const int64_t id = ids[static_cast<size_t>(r)];
    SY_CHECK_GE(id, 0);
    SY_CHECK_LT(id, table.dim(0));
    if (table.dtype == DType::kF32) {
      std::memcpy(to + r * hidden, table.as<float>() + id * hidden,
                  static_cast<size_t>(hidden) * sizeof(float));
    } else {
      kernels_->widen(&(table.as<bf16>() + id * hidden)->bits, hidden, to + r * hidden);
    }
  });
}

void CpuBackend::RmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  const FlushDenormals flush;
  const int64_t dim = x.dim(x.ndim - 1);
  const int64_t rows = dim == 0 ? 0 : x.numel() / dim;
  SY_CHECK_EQ(weight.numel(), dim);
  SY_CHECK_EQ(out.numel(), x.numel());
  SY_CHECK(IsActivation(out.dtype));
  const float* from = x.as<float>();
  const float* scale = weight.as<float>();
  RunRows(rows, dim, [&](int64_t r) {
    kernels_->rms_norm(from + r * dim, scale, eps, dim, RowAt(out, r, dim),
                       out.dtype == DType::kBF16);
  });
}

void CpuBackend::Rope(const Tensor& x, const Tensor& cos, const Tensor& sin,
                      std::span<const int32_t> positions) {
  const FlushDenormals flush;
  SY_CHECK_EQ(x.ndim, 3);
  SY_CHECK_EQ(x.dim(0), static_cast<int64_t>(positions.size()));
  const RopeShape shape = {.heads = x.dim(1), .head_dim = x.dim(2), .half = cos.dim(1)};
  SY_CHECK_LE(2 * shape.half, shape.head_dim);
  SY_CHECK_EQ(sin.dim(1), shape.half);
  const float* c = cos.as<float>();
  const float* s = sin.as<float>();
  float* data = x.as<float>();
  const int64_t width = shape.heads * shape.head_dim;
  RunRows(x.dim(0), width, [&](int64_t r) {
    const int64_t position = positions[static_cast<size_t>(r)];
    SY_CHECK_GE(position, 0);
    SY_CHECK_LT(position, cos.dim(0));
    kernels_->rope(data + r * width, c + position * shape.half, s + position * shape.half, shape);
  });
}

void CpuBackend::Combine(const CombineArgs& args) {
  const FlushDenormals flush;
  const int64_t rows = args.residual.dim(0);
  const int64_t hidden = args.residual.dim(1);
  SY_CHECK_EQ(static_cast<int64_t>(args.row_of.size()), rows * args.top_k);
  SY_CHECK_EQ(static_cast<int64_t>(args.weights.size()), rows * args.top_k);
  SY_CHECK(args.top_k == 0 || args.expert_rows->dim(1) == hidden);
  float* residual = args.residual.as<float>();
  RunRows(rows, hidden * (args.top_k + 2), [&](int64_t r) {
    thread_local std::vector<float> sum;
    sum.assign(static_cast<size_t>(hidden), 0.0f);
    for (int64_t j = r * args.top_k; j < (r + 1) * args.top_k; ++j) {
      const int32_t row = args.row_of[static_cast<size_t>(j)];
      if (row < 0) continue;
      SY_CHECK_LT(row, args.expert_rows->dim(0));
      kernels_->accumulate(RowAt(*args.expert_rows, row, hidden),
                           args.expert_rows->dtype == DType::kBF16,
                           args.weights[static_cast<size_t>(j)], hidden, sum.data());
    }
    if (args.shared != nullptr) {
      kernels_->accumulate(RowAt(*args.shared, r, hidden), args.shared->dtype == DType::kBF16,
                           args.shared_gate == nullptr ? 1.0f : args.shared_gate[r], hidden,
                           sum.data());
    }
    kernels_->accumulate(sum.data(), false, 1.0f, hidden, residual + r * hidden);
  });
}

void CpuBackend::Add(const Tensor& x, const Tensor& residual) {
  const FlushDenormals flush;
  SY_CHECK_EQ(x.numel(), residual.numel());
  SY_CHECK(IsActivation(x.dtype));
  const int64_t hidden = residual.dim(residual.ndim - 1);
  float* to = residual.as<float>();
  RunRows(hidden == 0 ? 0 : residual.numel() / hidden, hidden, [&](int64_t r) {
    kernels_->accumulate(RowAt(x, r, hidden), x.dtype == DType::kBF16, 1.0f, hidden,
                         to + r * hidden);
  });
}

void CpuBackend::Sigmoid(const Tensor& x) {
  const FlushDenormals flush;
  kernels_->sigmoid(x.as<float>(), x.numel());
}

void CpuBackend::Sample(const Tensor& logits, std::span<const SamplingRow> rows,
                        std::span<SampledToken> out) {
  const FlushDenormals flush;
  const int64_t vocab = logits.dim(1);
  SY_CHECK_EQ(logits.dim(0), static_cast<int64_t>(rows.size()));
  SY_CHECK_EQ(out.size(), rows.size());
  const float* data = logits.as<float>();
  Run(logits.dim(0), logits.numel() * 4, [&](int64_t r) {
    out[static_cast<size_t>(r)] = SampleRow(
        *kernels_, {data + r * vocab, static_cast<size_t>(vocab)}, rows[static_cast<size_t>(r)]);
  });
}

void CpuBackend::Score(const Tensor& logits, std::span<const int32_t> target, int32_t num_top,
                       std::span<SampledToken> out) {
  const FlushDenormals flush;
  const int64_t vocab = logits.dim(1);
  SY_CHECK_EQ(logits.dim(0), static_cast<int64_t>(target.size()));
  SY_CHECK_EQ(out.size(), target.size());
  const float* data = logits.as<float>();
  Run(logits.dim(0), logits.numel() * 4, [&](int64_t r) {
    out[static_cast<size_t>(r)] =
        ScoreRow(*kernels_, {data + r * vocab, static_cast<size_t>(vocab)},
                 target[static_cast<size_t>(r)], num_top);
  });
}

}  // namespace switchyard::cpu

namespace switchyard {

std::string WeightFormatName(const WeightFormat& format) {
  if (!IsQuantized(format)) return format.type == WeightType::kF32 ? "float32" : "bfloat16";
  return (format.type == WeightType::kInt8 ? "int8/" : "int4/") + std::to_string(format.group) +
         (format.zero_points ? "/zero" : "");
}

std::unique_ptr<ComputeBackend> MakeCpuBackend(ThreadPool* pool, const std::string& isa,
                                               std::string* error) {
  const std::vector<std::string> paths = CpuIsaPaths();
  const std::string name = isa == "auto" ? paths.front() : isa;
  const cpu::KernelTable* kernels = cpu::FindKernelTable(name);
  if (kernels == nullptr) {
    std::string known;
    for (const std::string& p : paths) known += (known.empty() ? "" : ", ") + p;
    *error = "isa \"" + name + "\" is unknown or cannot run on this CPU; it offers: auto, " + known;
    return nullptr;
  }
  return std::make_unique<cpu::CpuBackend>(pool, kernels);
}

}  // namespace switchyard
