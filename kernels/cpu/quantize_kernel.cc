// Quantisation of weights when a matrix is packed. A lane is a column, and a column's sums run
// along its inputs: every path gives the same bytes.
#include "kernels/cpu/half.h"
#include "kernels/cpu/kernels.h"

namespace switchyard::SY_CPU_PATH {
namespace {

// What is stored for a group that holds a NaN or an infinity.
constexpr uint16_t kHalfNan = 0x7e00;

// A group's scales, one per column.
struct Scales {
  alignas(64) float scale[kLanes] = {};
  alignas(64) float inverse[kLanes] = {};  // 0 where the scale is
  uint16_t half[kLanes] = {};

  void Set(int lane, float wanted) {
    half[lane] = cpu::HalfFromFloat(wanted);
    scale[lane] = cpu::FloatFromHalf(half[lane]);
    inverse[lane] = scale[lane] == 0.0f ? 0.0f : 1.0f / scale[lane];
  }
};

// The codes of weights without the zero point, integral.
SY_INLINE F16 CodesOf(F16 weights, F16 inverse, F16 low, F16 high) {
  return Round(Min(Max(Mul(weights, inverse), low), high));
}

// The sum of squared errors of every column.
F16 SquaredErrors4(const float* w, int64_t count, const Scales& scales) {
  const F16 scale = Load(scales.scale), inverse = Load(scales.inverse);
  F16 error = Zero();
  for (int64_t i = 0; i < count; ++i, w += kLanes) {
    const F16 v = Load(w);
    const F16 e = Sub(v, Mul(scale, CodesOf(v, inverse, Splat(-8.0f), Splat(7.0f))));
    error = Add(error, Mul(e, e));
  }
  return error;
}

Scales ChooseScales4(const float* w, int64_t count, const float* extreme) {
  // The extreme weight's code in the candidates: beyond the range it is clipped, and the others
  // gain.
  constexpr float kSteps[] = {-8.0f, -7.5f, -8.5f, -9.0f, -9.5f, 7.0f, 7.5f, 8.0f, 8.5f};
  Scales best;
  float best_error[kLanes];
  for (float& error : best_error) error = __builtin_inff();
  for (const float step : kSteps) {
    Scales tried;
    for (int j = 0; j < kLanes; ++j) tried.Set(j, extreme[j] / step);
    alignas(64) float error[kLanes];
    Store(error, SquaredErrors4(w, count, tried));
    for (int j = 0; j < kLanes; ++j) {
      if (tried.scale[j] == 0.0f || !(error[j] < best_error[j])) continue;
      best_error[j] = error[j];
      best.half[j] = tried.half[j];
      best.scale[j] = tried.scale[j];
      best.inverse[j] = tried.inverse[j];
    }
  }
  return best;
}

}  // namespace

void QuantizeWeights(const float* w, int64_t count, WeightType type, uint16_t* halves,
                     uint8_t* codes) {
  F16 low = Zero(), high = Zero(), poison = Zero();
  for (int64_t i = 0; i < count; ++i) {
    const F16 v = Load(w + i * kLanes);
    low = Min(v, low);
    high = Max(v, high);
    poison = Add(poison, Mul(v, Zero()));  // NaN where a weight is not finite
  }
  alignas(64) float lows[kLanes], extreme[kLanes], poisons[kLanes];
  Store(lows, low);
  Store(extreme, high);
  Store(poisons, poison);
  for (int j = 0; j < kLanes; ++j) {
    if (-lows[j] > extreme[j]) extreme[j] = lows[j];
  }
  const bool is_int8 = type == WeightType::kInt8;
  Scales scales;
  if (is_int8) {
    for (int j = 0; j < kLanes; ++j) scales.Set(j, __builtin_fabsf(extreme[j]) / 127.0f);
  } else {
    scales = ChooseScales4(w, count, extreme);
  }
  const F16 inverse = Load(scales.inverse);
  const F16 least = Splat(is_int8 ? -127.0f : -8.0f), most = Splat(is_int8 ? 127.0f : 7.0f);
  for (int64_t i = 0; i < count; ++i) {
    const F16 code = CodesOf(Load(w + i * kLanes), inverse, least, most);
    uint8_t* out = codes + i * kLanes;
    StoreInt8(reinterpret_cast<int8_t*>(out), code);
    for (int j = 0; j < kLanes; ++j) {
      out[j] = static_cast<uint8_t>(out[j] + (is_int8 ? 128 : 8));
      if (poisons[j] != 0.0f) out[j] = 0;
    }
  }
  for (int j = 0; j < kLanes; ++j) halves[j] = poisons[j] != 0.0f ? kHalfNan : scales.half[j];
}

}  // namespace switchyard::SY_CPU_PATH
