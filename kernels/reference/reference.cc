#include "kernels/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>

namespace switchyard::reference {
namespace {

double Silu(double x) { return x / (1.0 + std::exp(-x)); }

// Ids in descending order of value, ties to the lower id.
std::vector<int32_t> Order(const std::vector<double>& values) {
  std::vector<int32_t> ids(values.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
  });
  return ids;
}

std::vector<double> Softmax(const std::vector<double>& x) {
  const double max = *std::max_element(x.begin(), x.end());
  std::vector<double> p;
  for (double v : x) p.push_back(std::exp(v - max));
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& v : p) v /= sum;
  return p;
}

}  // namespace

Matrix Widen(const Tensor& t) {
  Matrix m(t.dim(0), t.dim(0) == 0 ? 0 : t.numel() / t.dim(0));
  for (size_t i = 0; i < m.values.size(); ++i) {
    m.values[i] = t.dtype == DType::kBF16 ? static_cast<double>(ToFloat(t.as<bf16>()[i]))
                                          : static_cast<double>(t.as<float>()[i]);
  }
  return m;
}

Matrix RoundTo(const Matrix& x, DType dtype) {
  Matrix out = x;
  for (double& v : out.values) {
    const float f = static_cast<float>(v);
    v = static_cast<double>(dtype == DType::kBF16 ? ToFloat(ToBF16(f)) : f);
  }
  return out;
}

Matrix Matmul(const Matrix& x, const Matrix& w, std::span<const float> bias) {
  Matrix out(x.rows, w.rows);
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t j = 0; j < w.rows; ++j) {
      double sum = 0.0;
      for (int64_t k = 0; k < x.columns; ++k) sum += x.at(r, k) * w.at(j, k);
      out.at(r, j) = sum + (bias.empty() ? 0.0 : static_cast<double>(bias[static_cast<size_t>(j)]));
    }
  }
  return out;
}

Matrix MatmulMagnitude(const Matrix& x, const Matrix& w) {
  Matrix ax = x, aw = w;
  for (double& v : ax.values) v = std::fabs(v);
  for (double& v : aw.values) v = std::fabs(v);
  return Matmul(ax, aw, {});
}

namespace {

double Half(const std::byte* p) {
  uint16_t bits = 0;
  std::memcpy(&bits, p, 2);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// Where a panel lies: four panels are interleaved, the last ones may be fewer.
struct PanelPlace {
  const std::byte* slab;
  int64_t width;
  int64_t at;
};

double QuantizedWeight(const PanelPlace& p, const WeightFormat& f, int64_t column, int64_t i) {
  const bool is_8bit = f.type == WeightType::kInt8;
  const int64_t scale_bytes = (p.width * 32 + 63) / 64 * 64, zero_bytes = f.zero_points ? 64 : 0;
  const int64_t group_bytes = scale_bytes + zero_bytes + f.group * p.width * (is_8bit ? 16 : 8);
  const std::byte* group = p.slab + i / f.group * group_bytes;
  const int64_t inputs = is_8bit ? 4 : 8, in_group = i % f.group;
  const int byte =
      static_cast<int>(group[scale_bytes + zero_bytes + (in_group / inputs * p.width + p.at) * 64 +
                             column * 4 + i % 4]);
  const int code = is_8bit ? byte : i % 8 < 4 ? byte & 15 : byte >> 4;
  const int fixed = is_8bit ? 128 : 8;
  const int zero =
      f.zero_points ? static_cast<int>(group[scale_bytes + p.at * 16 + column]) : fixed;
  return Half(group + 2 * (p.at * 16 + column)) * (code - zero);
}

}  // namespace

Matrix Unpack(const PackedMatrix& w, int64_t num_sources, int64_t source) {
  Matrix out(w.n / num_sources, w.k);
  const int64_t panels = (out.rows + 15) / 16 * num_sources;
  // A slab's bytes are not proportional to its width where scales are padded: all but the last
  // one have width 4.
  const bool is_8bit = w.format.type == WeightType::kInt8;
  const int64_t group = w.format.group;
  const int64_t slab_bytes =
      w.format.type == WeightType::kF32 ? w.k * 256
      : w.format.type == WeightType::kBF16
          ? (w.k + 1) / 2 * 256
          : (w.k + group - 1) / group * (128 + (w.format.zero_points ? 64 : 0)) +
                (is_8bit ? (w.k + 3) / 4 : (w.k + 7) / 8) * 256;
  for (int64_t j = 0; j < out.rows; ++j) {
    const int64_t panel = j / 16 * num_sources + source, column = j % 16;
    const PanelPlace place = {.slab = w.storage.data() + panel / 4 * slab_bytes,
                              .width = std::min<int64_t>(4, panels - panel / 4 * 4),
                              .at = panel % 4};
    for (int64_t i = 0; i < w.k; ++i) {
      if (IsQuantized(w.format)) {
        out.at(j, i) = QuantizedWeight(place, w.format, column, i);
      } else if (w.format.type == WeightType::kF32) {
        const int64_t at = (i * place.width + place.at) * 16 + column;
        out.at(j, i) = static_cast<double>(reinterpret_cast<const float*>(place.slab)[at]);
      } else {
        const int64_t at = ((i / 2 * place.width + place.at) * 16 + column) * 2 + i % 2;
        out.at(j, i) = static_cast<double>(ToFloat(reinterpret_cast<const bf16*>(place.slab)[at]));
      }
    }
  }
  return out;
}

Matrix QuantizeRows(const Matrix& x) {
  constexpr int64_t kGroup = 128;
  Matrix out = x;
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t k0 = 0; k0 < x.columns; k0 += kGroup) {
      const int64_t end = std::min(x.columns, k0 + kGroup);
      float max = 0.0f;
      bool finite = true;
      for (int64_t k = k0; k < end; ++k) {
        finite = finite && std::isfinite(x.at(r, k));
        max = std::max(max, std::fabs(static_cast<float>(x.at(r, k))));
      }
      const float scale = max / 127.0f, inverse = 127.0f / max;
      for (int64_t k = k0; k < end; ++k) {
        const float code = std::nearbyintf(static_cast<float>(x.at(r, k)) * inverse);
        out.at(r, k) = !finite           ? NAN
                       : max > 0x1p-100f ? static_cast<double>(code) * static_cast<double>(scale)
                                         : 0.0;
      }
    }
  }
  return out;
}

Matrix RmsNorm(const Matrix& x, std::span<const float> weight, double eps) {
  Matrix out(x.rows, x.columns);
  for (int64_t r = 0; r < x.rows; ++r) {
    double squares = 0.0;
    for (int64_t i = 0; i < x.columns; ++i) squares += x.at(r, i) * x.at(r, i);
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(x.columns) + eps);
    for (int64_t i = 0; i < x.columns; ++i)
      out.at(r, i) = x.at(r, i) * scale * static_cast<double>(weight[static_cast<size_t>(i)]);
  }
  return out;
}

Matrix Rope(const Matrix& x, int64_t head_dim, const Matrix& cos, const Matrix& sin,
            std::span<const int32_t> positions) {
  Matrix out = x;
  const int64_t half = cos.columns;
  for (int64_t r = 0; r < x.rows; ++r) {
    const int64_t p = positions[static_cast<size_t>(r)];
    for (int64_t h = 0; h < x.columns; h += head_dim) {
      for (int64_t i = 0; i < half; ++i) {
        const double a = x.at(r, h + i), b = x.at(r, h + half + i);
        out.at(r, h + i) = a * cos.at(p, i) - b * sin.at(p, i);
        out.at(r, h + half + i) = b * cos.at(p, i) + a * sin.at(p, i);
      }
    }
  }
  return out;
}

Matrix GatedHidden(const Matrix& x, const Matrix& gate, const Matrix& up) {
  Matrix g = Matmul(x, gate, {});
  const Matrix u = Matmul(x, up, {});
  for (size_t i = 0; i < g.values.size(); ++i) g.values[i] = Silu(g.values[i]) * u.values[i];
  return g;
}

Matrix GatedMlp(const Matrix& x, const Matrix& gate, const Matrix& up, const Matrix& down,
                DType act) {
  return Matmul(RoundTo(GatedHidden(x, gate, up), act), down, {});
}

Matrix GatedMlpMagnitude(const Matrix& x, const Matrix& gate, const Matrix& up,
                         const Matrix& down) {
  Matrix g = MatmulMagnitude(x, gate);
  const Matrix u = MatmulMagnitude(x, up);
  for (size_t i = 0; i < g.values.size(); ++i) g.values[i] *= u.values[i];
  return MatmulMagnitude(g, down);
}

Matrix Attention(const AttentionShape& s, const Matrix& q, const Matrix& k, const Matrix& v,
                 int64_t start) {
  Matrix out(q.rows, q.columns);
  const int64_t group = s.num_heads / s.num_kv_heads;
  for (int64_t r = 0; r < q.rows; ++r) {
    for (int64_t h = 0; h < s.num_heads; ++h) {
      const int64_t kv = h / group * s.head_dim;
      std::vector<double> scores;
      for (int64_t p = 0; p <= start + r; ++p) {
        double dot = 0.0;
        for (int64_t d = 0; d < s.head_dim; ++d)
          dot += q.at(r, h * s.head_dim + d) * k.at(p, kv + d);
        scores.push_back(dot * s.scale);
      }
      const std::vector<double> weights = Softmax(scores);
      for (int64_t d = 0; d < s.head_dim; ++d) {
        double sum = 0.0;
        for (int64_t p = 0; p <= start + r; ++p)
          sum += weights[static_cast<size_t>(p)] * v.at(p, kv + d);
        out.at(r, h * s.head_dim + d) = sum;
      }
    }
  }
  return out;
}

Matrix Combine(const Matrix& residual, const Matrix& expert_rows, std::span<const int32_t> row_of,
               std::span<const float> weights, const Matrix* shared, const float* shared_gate) {
  Matrix out = residual;
  const size_t top_k = row_of.size() / static_cast<size_t>(std::max<int64_t>(1, residual.rows));
  for (int64_t r = 0; r < out.rows; ++r) {
    for (int64_t i = 0; i < out.columns; ++i) {
      for (size_t j = static_cast<size_t>(r) * top_k; j < (static_cast<size_t>(r) + 1) * top_k; ++j)
        if (row_of[j] >= 0)
          out.at(r, i) += static_cast<double>(weights[j]) * expert_rows.at(row_of[j], i);
      if (shared != nullptr)
        out.at(r, i) +=
            shared->at(r, i) * (shared_gate == nullptr ? 1.0 : static_cast<double>(shared_gate[r]));
    }
  }
  return out;
}

Routed Route(const RoutingConfig& config, const RoutingProfile& profile,
             std::span<const float> logits) {
  Routed routed;
  std::vector<double> x(logits.begin(), logits.end());
  for (double v : x)
    if (!std::isfinite(v)) return routed;
  std::vector<double> score = x;
  if (config.score == RouterScore::kSigmoid) {
    for (double& v : score) v = 1.0 / (1.0 + std::exp(-v));
  } else if (!config.softmax_after_topk) {
    score = Softmax(x);
  }
  std::vector<double> selection = score;
  for (size_t i = 0; i < selection.size(); ++i) {
    if (!profile.selection_bias.empty())
      selection[i] += static_cast<double>(profile.selection_bias[i]);
    if (!profile.allowed.empty() && profile.allowed[i] == 0)
      selection[i] = -std::numeric_limits<double>::infinity();
  }
  for (int32_t id : Order(selection)) {
    if (routed.ids.size() == static_cast<size_t>(config.top_k)) break;
    if (std::isinf(selection[static_cast<size_t>(id)])) break;
    routed.ids.push_back(id);
    routed.weights.push_back(score[static_cast<size_t>(id)]);
  }
  if (routed.ids.empty()) return routed;
  if (config.softmax_after_topk && config.score == RouterScore::kSoftmax)
    routed.weights = Softmax(routed.weights);
  const double sum = std::accumulate(routed.weights.begin(), routed.weights.end(), 0.0);
  for (double& w : routed.weights) {
    if (config.renormalize && sum > 0.0) w /= sum;
    w *= static_cast<double>(config.routed_scaling);
  }
  return routed;
}

std::vector<double> LogSoftmax(std::span<const float> logits) {
  std::vector<double> x(logits.begin(), logits.end());
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0.0;
  for (double v : x) sum += std::exp(v - max);
  for (double& v : x) v -= max + std::log(sum);
  return x;
}

std::vector<double> TokenProbabilities(std::span<const float> logits, const SamplingRow& row) {
  std::vector<double> x(logits.begin(), logits.end());
  const auto legal = [&](int32_t id) { return id >= 0 && static_cast<size_t>(id) < x.size(); };
  for (const auto& [id, bias] : row.logit_bias)
    if (legal(id)) x[static_cast<size_t>(id)] += static_cast<double>(bias);
  std::map<int32_t, int> seen, generated;
  for (int32_t id : row.prompt) ++seen[id];
  for (int32_t id : row.generated) ++seen[id], ++generated[id];
  for (const auto& [id, count] : seen) {
    if (!legal(id)) continue;
    double& v = x[static_cast<size_t>(id)];
    const double penalty = static_cast<double>(row.repetition_penalty);
    v = v > 0 ? v / penalty : v * penalty;
  }
  for (const auto& [id, count] : generated) {
    if (!legal(id)) continue;
    x[static_cast<size_t>(id)] -= static_cast<double>(row.frequency_penalty) * count +
                                  static_cast<double>(row.presence_penalty);
  }
  for (int32_t id : row.banned)
    if (legal(id)) x[static_cast<size_t>(id)] = -std::numeric_limits<double>::infinity();

  const std::vector<int32_t> order = Order(x);
  std::vector<double> p(x.size(), 0.0);
  if (row.temperature < 1e-5f) {
    p[static_cast<size_t>(order[0])] = 1.0;
    return p;
  }
  std::vector<double> scaled;
  for (double v : x) scaled.push_back(v / static_cast<double>(row.temperature));
  p = Softmax(scaled);
  const double max = *std::max_element(p.begin(), p.end());
  double left = 0.0;
  for (double& v : p) {
    if (v < static_cast<double>(row.min_p) * max) v = 0.0;
  }
  for (size_t i = 0; i < order.size(); ++i) {
    double& v = p[static_cast<size_t>(order[i])];
    if (row.top_k > 0 && i >= static_cast<size_t>(row.top_k)) v = 0.0;
    left += v;
  }
  double before = 0.0;
  for (int32_t id : order) {
    double& v = p[static_cast<size_t>(id)];
    const double mine = v;
    if (before > 0.0 && row.top_p < 1.0f && before >= static_cast<double>(row.top_p) * left)
      v = 0.0;
    before += mine;
  }
  const double kept = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& v : p) v /= kept;
  return p;
}

}  // namespace switchyard::reference
