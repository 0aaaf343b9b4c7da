// Quantisation of weights when a matrix is packed: scalar code, the same bytes for every
// instruction path.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/weight_format.h"

namespace switchyard::cpu {

// float16 bits: to nearest, ties to even; beyond the range infinity.
uint16_t HalfFromFloat(float value);
float FloatFromHalf(uint16_t bits);

// Codes of weights that share a scale, so that weight = scale * (code - zero), zero = 128 (kInt8)
// or 8 (kInt4). Returns the scale as float16 bits: NaN when a weight is not finite. kInt8: max |w|
// / 127. kInt4: the one of several scales around max |w| / 8 with the least sum of squared errors;
// it may be negative, so that the largest weight has the code 0.
uint16_t QuantizeGroup(std::span<const float> weights, WeightType type, uint8_t* codes);

}  // namespace switchyard::cpu
