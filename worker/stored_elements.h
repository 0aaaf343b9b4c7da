// Elements of stored tensors as numbers: float16, float8 e4m3 and e8m0, fp4 e2m1. Pure functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "worker/safetensors.h"

namespace switchyard {

// IEEE 754 binary16.
float HalfToFloat(uint16_t half);
// OCP FP8 e4m3fn: no infinities, 0x7f and 0xff are NaN (OCP 8-bit Floating Point
// Specification 1.0).
float E4M3ToFloat(uint8_t code);
// A power of two, 2^(code - 127); 255 is NaN (OCP Microscaling Formats Specification 1.0,
// section 5.4.1).
float E8M0ToFloat(uint8_t code);
// 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign in bit 3 (the same, section 5.3.3). REQUIRES: code < 16.
float E2M1ToFloat(uint8_t code);

// Element `i` of float data. REQUIRES: a plain float, kF8E8M0, or kU8 taken as e8m0.
float FloatElement(const std::byte* data, StoredDType dtype, int64_t i);
// Element `i` of integer data. REQUIRES: kI8, kU8, kI32 or kI64.
int64_t IntElement(const std::byte* data, StoredDType dtype, int64_t i);

}  // namespace switchyard
