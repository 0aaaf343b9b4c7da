// float16, as scales are stored: scalar code, the same bits for every instruction path. Includes no
// standard header with inline functions, see simd.h.
#pragma once

#include <cstdint>

namespace switchyard::cpu {

// float16 bits: to nearest, ties to even; beyond the range infinity.
uint16_t HalfFromFloat(float value);
float FloatFromHalf(uint16_t bits);

}  // namespace switchyard::cpu
