#include "worker/stored_elements.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/check.h"
#include "kernels/tensor.h"

namespace switchyard {
namespace {

template <typename T>
T Read(const std::byte* data, int64_t i) {
  T value;  // the data of a file need not be aligned
  std::memcpy(&value, data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

}  // namespace

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -value : value;
  }
  const uint32_t bits = exponent == 31 ? sign | 0x7f800000u | (mantissa << 13)
                                       : sign | ((exponent + 112) << 23) | (mantissa << 13);
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

float E4M3ToFloat(uint8_t code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  float value;
  if ((code & 0x7f) == 0x7f) {
    value = std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -9);
  } else {
    value = std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  }
  return (code & 0x80) != 0 ? -value : value;
}

float E8M0ToFloat(uint8_t code) {
  return code == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, code - 127);
}

float E2M1ToFloat(uint8_t code) {
  constexpr float kMagnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const float value = kMagnitudes[code & 7];
  return (code & 8) != 0 ? -value : value;
}

float FloatElement(const std::byte* data, StoredDType dtype, int64_t i) {
  switch (dtype) {
    case StoredDType::kF32:
      return Read<float>(data, i);
    case StoredDType::kBF16:
      return ToFloat(bf16{Read<uint16_t>(data, i)});
    case StoredDType::kF16:
      return HalfToFloat(Read<uint16_t>(data, i));
    case StoredDType::kF8E8M0:
    case StoredDType::kU8:
      return E8M0ToFloat(Read<uint8_t>(data, i));
    default:
      SY_CHECK(false);
  }
}

int64_t IntElement(const std::byte* data, StoredDType dtype, int64_t i) {
  switch (dtype) {
    case StoredDType::kI8:
      return Read<int8_t>(data, i);
    case StoredDType::kU8:
      return Read<uint8_t>(data, i);
    case StoredDType::kI32:
      return Read<int32_t>(data, i);
    case StoredDType::kI64:
      return Read<int64_t>(data, i);
    default:
      SY_CHECK(false);
  }
}

}  // namespace switchyard
