// Row by row operations. Every sum over a row has one fixed tree: 16 lane sums in ascending order,
// then ReduceSum.
#include "kernels/cpu/kernels.h"

namespace switchyard::SY_CPU_PATH {
namespace {

int64_t Count(int64_t n, int64_t i) { return n - i < kLanes ? n - i : kLanes; }

template <typename T>
void NormRow(const float* x, const float* weight, float inverse, int64_t n, T* out) {
  const F16 scale = Splat(inverse);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = Count(n, i);
    StoreSome(out + i, Mul(Mul(LoadSome(x + i, count), scale), LoadSome(weight + i, count)), count);
  }
}

template <typename T>
void AccumulateRow(const T* x, F16 weight, int64_t n, float* sum) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = Count(n, i);
    StoreSome(sum + i, Fma(LoadSome(x + i, count), weight, LoadSome(sum + i, count)), count);
  }
}

}  // namespace

void RmsNorm(const float* x, const float* weight, float eps, int64_t n, void* out, bool out_bf16) {
  F16 squares = Zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const F16 v = LoadSome(x + i, Count(n, i));
    squares = Fma(v, v, squares);
  }
  const float mean = ReduceSum(squares) / static_cast<float>(n);
  const float inverse = 1.0f / __builtin_sqrtf(mean + eps);
  if (out_bf16) {
    NormRow(x, weight, inverse, n, static_cast<uint16_t*>(out));
  } else {
    NormRow(x, weight, inverse, n, static_cast<float*>(out));
  }
}

void Rope(float* x, const float* cos, const float* sin, const cpu::RopeShape& shape) {
  for (int64_t h = 0; h < shape.heads; ++h, x += shape.head_dim) {
    for (int64_t i = 0; i < shape.half; i += kLanes) {
      const int64_t count = Count(shape.half, i);
      const F16 c = LoadSome(cos + i, count);
      const F16 s = LoadSome(sin + i, count);
      const F16 a = LoadSome(x + i, count);
      const F16 b = LoadSome(x + shape.half + i, count);
      StoreSome(x + i, Sub(Mul(a, c), Mul(b, s)), count);
      StoreSome(x + shape.half + i, Add(Mul(b, c), Mul(a, s)), count);
    }
  }
}

void Narrow(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += kLanes)
    StoreSome(out + i, LoadSome(x + i, Count(n, i)), Count(n, i));
}

void Widen(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes)
    StoreSome(out + i, LoadSome(x + i, Count(n, i)), Count(n, i));
}

void Sigmoid(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    StoreSome(x + i, SigmoidOf(LoadSome(x + i, Count(n, i))), Count(n, i));
}

void Accumulate(const void* x, bool bf16, float weight, int64_t n, float* sum) {
  if (bf16) {
    AccumulateRow(static_cast<const uint16_t*>(x), Splat(weight), n, sum);
  } else {
    AccumulateRow(static_cast<const float*>(x), Splat(weight), n, sum);
  }
}

cpu::LogitStats Stats(const float* x, int64_t n) {
  constexpr float kInfinity = __builtin_inff();
  F16 max = Splat(-kInfinity);
  F16 poison = Zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F16 v = Load(x + i);
    max = Max(max, v);
    poison = AddPoison(v, poison);
  }
  cpu::LogitStats stats = {.max = ReduceMax(max), .finite = ReduceSum(poison) == 0.0f};
  for (; i < n; ++i) {
    if (!(x[i] < kInfinity)) stats.finite = false;
    if (x[i] > stats.max) stats.max = x[i];
  }
  if (!(stats.max > -kInfinity)) stats.finite = false;
  return stats;
}

double ExpSum(const float* x, int64_t n, float max, float scale, float* out) {
  constexpr int64_t kChunk = 1024;
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = n - begin < kChunk ? n : begin + kChunk;
    F16 sum = Zero();
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t count = Count(end, i);
      F16 e = Exp(Mul(Sub(LoadSome(x + i, count), Splat(max)), Splat(scale)));
      if (count < kLanes) {
        alignas(64) float lanes[kLanes];
        Store(lanes, e);
        e = LoadSome(lanes, count);
      }
      if (out != nullptr) StoreSome(out + i, e, count);
      sum = Add(sum, e);
    }
    total += static_cast<double>(ReduceSum(sum));
  }
  return total;
}

}  // namespace switchyard::SY_CPU_PATH
