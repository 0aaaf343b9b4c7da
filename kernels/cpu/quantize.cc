#include "kernels/cpu/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace switchyard::cpu {
namespace {

uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To the nearest integer, ties to even. REQUIRES: |v| < 2^22.
float Round(float v) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (v + magic) - magic;
}
float Clamp(float v, float low, float high) { return std::min(std::max(v, low), high); }

// The code of a weight without the zero point.
float CodeOf(float weight, float inverse, float low, float high) {
  return Round(Clamp(weight * inverse, low, high));
}

uint16_t QuantizeGroup8(std::span<const float> weights, float max, uint8_t* codes) {
  const uint16_t half = HalfFromFloat(max / 127.0f);
  const float scale = FloatFromHalf(half);
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (size_t i = 0; i < weights.size(); ++i)
    codes[i] = static_cast<uint8_t>(CodeOf(weights[i], inverse, -127.0f, 127.0f) + 128.0f);
  return half;
}

float SquaredError4(std::span<const float> weights, float scale) {
  const float inverse = 1.0f / scale;
  float error = 0.0f;
  for (const float w : weights) {
    const float e = w - scale * CodeOf(w, inverse, -8.0f, 7.0f);
    error += e * e;
  }
  return error;
}

uint16_t QuantizeGroup4(std::span<const float> weights, float extreme, uint8_t* codes) {
  // The extreme weight's code in the candidates: beyond the range it is clipped, and the others
  // gain.
  constexpr float kSteps[] = {-8.0f, -7.5f, -8.5f, -9.0f, -9.5f, 7.0f, 7.5f, 8.0f, 8.5f};
  uint16_t best = 0;
  float best_error = INFINITY;
  for (const float step : kSteps) {
    const uint16_t half = HalfFromFloat(extreme / step);
    const float scale = FloatFromHalf(half);
    if (scale == 0.0f) continue;
    const float error = SquaredError4(weights, scale);
    if (error < best_error) {
      best_error = error;
      best = half;
    }
  }
  const float scale = FloatFromHalf(best);
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (size_t i = 0; i < weights.size(); ++i)
    codes[i] = static_cast<uint8_t>(CodeOf(weights[i], inverse, -8.0f, 7.0f) + 8.0f);
  return best;
}

}  // namespace

uint16_t HalfFromFloat(float value) {
  const uint32_t sign = Bits(value) >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (!(magnitude < 65520.0f)) {
    return static_cast<uint16_t>(sign | (std::isnan(value) ? 0x7e00 : 0x7c00));
  }
  if (magnitude < 0x1p-14f) {  // a multiple of 2^-24: adding 0.5 rounds to it
    return static_cast<uint16_t>(sign | (Bits(magnitude + 0.5f) - Bits(0.5f)));
  }
  const uint32_t bits = Bits(magnitude);
  return static_cast<uint16_t>(sign |
                               ((bits + 0xfff + (bits >> 13 & 1) - (uint32_t{112} << 23)) >> 13));
}

float FloatFromHalf(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const uint32_t magnitude = exponent == 0
                                 ? Bits(static_cast<float>(mantissa) * 0x1p-24f)
                                 : (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
  return FromBits(sign | magnitude);
}

uint16_t QuantizeGroup(std::span<const float> weights, WeightType type, uint8_t* codes) {
  float low = 0.0f, high = 0.0f, poison = 0.0f;
  for (const float w : weights) {
    low = std::min(low, w);
    high = std::max(high, w);
    poison += w * 0.0f;
  }
  if (poison != 0.0f) {  // a NaN
    std::fill_n(codes, weights.size(), uint8_t{0});
    return 0x7e00;
  }
  const float extreme = -low > high ? low : high;
  return type == WeightType::kInt8 ? QuantizeGroup8(weights, std::fabs(extreme), codes)
                                   : QuantizeGroup4(weights, extreme, codes);
}

}  // namespace switchyard::cpu
