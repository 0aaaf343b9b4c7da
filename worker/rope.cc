#include "worker/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace switchyard {
namespace {

constexpr double kTwoPi = 2.0 * std::numbers::pi;

// Linear ramp of YaRN: 0 below `low`, 1 above `high`, over the dimension pairs.
struct YarnRamp {
  double low = 0.0;
  double high = 1.0;
  double At(int64_t pair) const {
    return std::clamp((static_cast<double>(pair) - low) / (high - low), 0.0, 1.0);
  }
};

YarnRamp MakeYarnRamp(const RopeConfig& rope) {
  const double dim = static_cast<double>(rope.rotary_dim);
  // The dimension at which a frequency makes `rotations` turns within the trained context.
  const auto correction = [&](double rotations) {
    return dim * std::log(static_cast<double>(rope.original_max_position) / (rotations * kTwoPi)) /
           (2.0 * std::log(rope.theta));
  };
  double low = correction(rope.beta_fast);
  double high = correction(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;
  return {low, high};
}

double YarnScale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

double YarnAttentionFactor(const RopeConfig& rope) {
  if (rope.attention_factor >= 0.0) return rope.attention_factor;
  if (rope.mscale > 0.0 && rope.mscale_all_dim > 0.0) {
    return YarnScale(rope.factor, rope.mscale) / YarnScale(rope.factor, rope.mscale_all_dim);
  }
  return YarnScale(rope.factor, 1.0);
}

double Llama3Frequency(const RopeConfig& rope, double inv_freq) {
  const double context = static_cast<double>(rope.original_max_position);
  const double wavelength = kTwoPi / inv_freq;
  if (wavelength < context / rope.high_freq_factor) return inv_freq;
  if (wavelength > context / rope.low_freq_factor) return inv_freq / rope.factor;
  const double smooth = (context / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - smooth) * inv_freq / rope.factor + smooth * inv_freq;
}

}  // namespace

RopeFrequencies ComputeRopeFrequencies(const RopeConfig& rope) {
  RopeFrequencies out;
  const int64_t pairs = rope.rotary_dim / 2;
  const YarnRamp ramp = MakeYarnRamp(rope);
  for (int64_t i = 0; i < pairs; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(rope.rotary_dim);
    double inv_freq = 1.0 / std::pow(rope.theta, exponent);
    switch (rope.type) {
      case RopeType::kDefault:
      case RopeType::kDynamicNtk:  // unscaled up to max_position_embeddings, where contexts end
        break;
      case RopeType::kLinear:
        inv_freq /= rope.factor;
        break;
      case RopeType::kYarn:
        inv_freq = inv_freq / rope.factor * ramp.At(i) + inv_freq * (1.0 - ramp.At(i));
        break;
      case RopeType::kLlama3:
        inv_freq = Llama3Frequency(rope, inv_freq);
        break;
    }
    out.inv_freq.push_back(static_cast<float>(inv_freq));
  }
  if (rope.type == RopeType::kYarn)
    out.attention_factor = static_cast<float>(YarnAttentionFactor(rope));
  return out;
}

RopeTables MakeRopeTables(const RopeConfig& rope, int64_t num_positions) {
  const RopeFrequencies frequencies = ComputeRopeFrequencies(rope);
  const int64_t pairs = static_cast<int64_t>(frequencies.inv_freq.size());
  RopeTables tables;
  const size_t bytes = static_cast<size_t>(num_positions * pairs) * sizeof(float);
  tables.cos_storage = Buffer(bytes);
  tables.sin_storage = Buffer(bytes);
  tables.cos = tables.cos_storage.View(DType::kF32, {num_positions, pairs});
  tables.sin = tables.sin_storage.View(DType::kF32, {num_positions, pairs});
  float* cos = tables.cos.as<float>();
  float* sin = tables.sin.as<float>();
  for (int64_t p = 0; p < num_positions; ++p) {
    for (int64_t i = 0; i < pairs; ++i) {
      // The angle is a float32 product, as in transformers; only then is the double library
      // function exact enough.
      const float angle = static_cast<float>(p) * frequencies.inv_freq[static_cast<size_t>(i)];
      const double factor = static_cast<double>(frequencies.attention_factor);
      *cos++ = static_cast<float>(std::cos(static_cast<double>(angle)) * factor);
      *sin++ = static_cast<float>(std::sin(static_cast<double>(angle)) * factor);
    }
  }
  return tables;
}

}  // namespace switchyard
