// WeightFormat: how a packed matrix keeps its weights. The kernels of every instruction path
// include it, so its functions are always inlined.
#pragma once

#include <cstdint>

namespace switchyard {

// kInt8 and kInt4 are weight = scale * (code - zero point): codes of 8 or 4 unsigned bits, a
// float16 scale for every column and group of neighbours along k.
enum class WeightType : uint8_t { kF32, kBF16, kInt8, kInt4 };

struct WeightFormat {
  WeightType type = WeightType::kF32;
  int32_t group = 0;         // inputs that share a scale: 32 or 128; 0 for kF32 and kBF16
  bool zero_points = false;  // one per column and group; else 128 (kInt8) or 8 (kInt4) everywhere

  bool operator==(const WeightFormat&) const = default;
};

[[gnu::always_inline]] inline constexpr bool IsQuantized(WeightFormat format) {
  return format.type == WeightType::kInt8 || format.type == WeightType::kInt4;
}

// What our own quantisation makes.
inline constexpr WeightFormat kInt8Weights{WeightType::kInt8, 128, false};
inline constexpr WeightFormat kInt4Weights{WeightType::kInt4, 32, false};

}  // namespace switchyard
