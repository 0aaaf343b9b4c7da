#include "kernels/cpu/half.h"

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

}  // namespace switchyard::cpu
