// The truth for every op: float64, scalar, one line per formula, slow on purpose. Linked by tests
// only.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/routing_policy.h"
#include "kernels/tensor.h"

namespace switchyard::reference {

struct Matrix {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<double> values;  // row-major

  Matrix() = default;
  Matrix(int64_t r, int64_t c)
      : rows(r), columns(c), values(static_cast<size_t>(r) * static_cast<size_t>(c)) {}
  double& at(int64_t r, int64_t c) { return values[static_cast<size_t>(r * columns + c)]; }
  double at(int64_t r, int64_t c) const { return values[static_cast<size_t>(r * columns + c)]; }
};

// A tensor [d0, d1, …] as a matrix [d0, d1 * …].
Matrix Widen(const Tensor& t);
// Each value rounded to `dtype` and back.
Matrix RoundTo(const Matrix& x, DType dtype);

// x [rows, k], w [n, k], bias [n] or empty.
Matrix Matmul(const Matrix& x, const Matrix& w, std::span<const float> bias);
// The sum of the magnitudes of the terms of each output: what rounding errors are relative to.
Matrix MatmulMagnitude(const Matrix& x, const Matrix& w);

// What a packed matrix of the CPU's layout holds (cpu/kernel_table.h), and of an MLP's gate_up the
// gate (source 0) or the up (source 1) of `num_sources`.
Matrix Unpack(const PackedMatrix& w, int64_t num_sources = 1, int64_t source = 0);
// Rows as products with quantised weights see them: code * scale per group of 128 (backend.h).
// REQUIRES: values that are float32.
Matrix QuantizeRows(const Matrix& x);

Matrix RmsNorm(const Matrix& x, std::span<const float> weight, double eps);
// x [rows, heads * head_dim]; cos, sin [max_positions, half].
Matrix Rope(const Matrix& x, int64_t head_dim, const Matrix& cos, const Matrix& sin,
            std::span<const int32_t> positions);
// silu(gate x) * up x.
Matrix GatedHidden(const Matrix& x, const Matrix& gate, const Matrix& up);
// down( round( silu(gate x) * up x ) ), rounded to `act` where the backend rounds.
Matrix GatedMlp(const Matrix& x, const Matrix& gate, const Matrix& up, const Matrix& down,
                DType act);
// What its rounding errors are relative to, as MatmulMagnitude.
Matrix GatedMlpMagnitude(const Matrix& x, const Matrix& gate, const Matrix& up, const Matrix& down);

struct AttentionShape {
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  double scale = 1.0;
};
// q [rows, num_heads * head_dim] at positions start, start + 1, …; k, v [positions, num_kv_heads *
// head_dim].
Matrix Attention(const AttentionShape& shape, const Matrix& q, const Matrix& k, const Matrix& v,
                 int64_t start);

Matrix Combine(const Matrix& residual, const Matrix& expert_rows, std::span<const int32_t> row_of,
               std::span<const float> weights, const Matrix* shared, const float* shared_gate);

struct Routed {
  std::vector<int32_t> ids;
  std::vector<double> weights;
};
// One token, SEEDS.md M1's steps by the book.
Routed Route(const RoutingConfig& config, const RoutingProfile& profile,
             std::span<const float> logits);

// The probabilities with which one row's token is drawn; one-hot when greedy.
std::vector<double> TokenProbabilities(std::span<const float> logits, const SamplingRow& row);
std::vector<double> LogSoftmax(std::span<const float> logits);

}  // namespace switchyard::reference
