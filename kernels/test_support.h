// For the tests of this room: random tensors inside guard bytes, error measures with the bound of
// each type, backends over every instruction path and several thread counts.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/reference/reference.h"
#include "kernels/test_seed.h"
#include "kernels/thread_pool.h"

namespace switchyard::testing {

// A tensor between guard bytes; the destructor fails the test when one was written.
class Guarded {
 public:
  Guarded(DType dtype, std::initializer_list<int64_t> dims)
      : tensor_(nullptr, dtype, dims), memory_(tensor_.bytes() + 2 * kGuard) {
    SY_CHECK_LT(memory_.bytes(), size_t{1} << 32);
    for (size_t i = 0; i < memory_.bytes(); ++i) memory_.data()[i] = std::byte{kByte};
    tensor_.data = memory_.data() + kGuard;
  }
  Guarded(Guarded&&) = default;
  ~Guarded() {
    if (memory_.data() == nullptr) return;
    for (size_t i = 0; i < kGuard; ++i) {
      EXPECT_EQ(memory_.data()[i], std::byte{kByte}) << "guard byte " << i << " before a tensor";
      EXPECT_EQ(memory_.data()[kGuard + tensor_.bytes() + i], std::byte{kByte})
          << "guard byte " << i << " after a tensor";
    }
  }
  const Tensor& t() const { return tensor_; }
  const std::byte* bytes() const { return memory_.data() + kGuard; }
  Tensor Rows(int64_t begin, int64_t end) const {
    Tensor view = tensor_;
    const size_t row_bytes = tensor_.bytes() / static_cast<size_t>(tensor_.dim(0));
    view.data = static_cast<std::byte*>(tensor_.data) + static_cast<size_t>(begin) * row_bytes;
    view.shape[0] = end - begin;
    return view;
  }
  static constexpr int kByte = 0xa5;

 private:
  static constexpr size_t kGuard = 128;
  Tensor tensor_;
  Buffer memory_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  Guarded Normal(DType dtype, std::initializer_list<int64_t> dims, float scale = 1.0f) {
    Guarded g(dtype, dims);
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t i = 0; i < g.t().numel(); ++i) {
      const float v = normal(engine_);
      if (dtype == DType::kBF16) {
        g.t().as<bf16>()[i] = ToBF16(v);
      } else {
        g.t().as<float>()[i] = v;
      }
    }
    return g;
  }
  int64_t Int(int64_t low, int64_t high) {  // inclusive
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  float Float(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(engine_);
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// Bounds per type: float32 results of float32 sums; bfloat16 results carry one rounding, whose
// error is uniform in +-ulp/2: its mean square is ulp^2 / 12, at most 2^-14 / 12 of the value's
// square.
inline double NmseBound(DType t) { return t == DType::kBF16 ? 0x1.0p-14 / 12 : 1e-11; }
inline double RelativeBound(DType t) { return t == DType::kBF16 ? 0x1.0p-8 : 2e-6; }

// The variance of the square of a bfloat16's rounding error: ulp^4 / 180.
inline double SquareVariance(double value) {
  if (value == 0.0) return 0.0;
  const double ulp = std::ldexp(1.0, std::ilogb(value) - 7);
  return ulp * ulp * ulp * ulp / 180;
}

// Normalised mean square error (its bound, and six standard deviations of the roundings where few
// values carry the power), and every element within RelativeBound of `magnitude` (default: the
// largest |want|).
inline void ExpectClose(const Tensor& got, const reference::Matrix& want, const std::string& what,
                        const reference::Matrix* magnitude = nullptr, double slack = 1.0) {
  const reference::Matrix g = reference::Widen(got);
  ASSERT_EQ(g.values.size(), want.values.size()) << what;
  double error = 0.0, power = 0.0, terms = 0.0, variance = 0.0, largest = 0.0;
  for (double v : want.values) largest = std::max(largest, std::fabs(v));
  for (size_t i = 0; i < want.values.size(); ++i) {
    const double e = g.values[i] - want.values[i];
    error += e * e;
    const double m = magnitude == nullptr ? largest : magnitude->values[i];
    power += want.values[i] * want.values[i];
    terms += m * m;
    if (got.dtype == DType::kBF16) variance += SquareVariance(want.values[i]);
    ASSERT_LE(std::fabs(e), slack * RelativeBound(got.dtype) * m + 1e-30)
        << what << ": element " << i << " is " << g.values[i] << ", not " << want.values[i];
  }
  // A few numbers that are mostly cancellation say nothing.
  if (want.values.size() >= 64 && power > 1e-3 * terms) {
    const double bound = NmseBound(got.dtype) * power + 6 * std::sqrt(variance);
    EXPECT_LE(error, slack * slack * bound) << what << ": NMSE " << error / power;
  }
}

// Rows [begin, end) of a and the same number of rows of b from b_begin are the same bytes.
inline bool SameRows(const Tensor& a, int64_t begin, int64_t end, const Tensor& b,
                     int64_t b_begin) {
  const size_t row = a.bytes() / static_cast<size_t>(a.dim(0));
  return std::memcmp(static_cast<const std::byte*>(a.data) + static_cast<size_t>(begin) * row,
                     static_cast<const std::byte*>(b.data) + static_cast<size_t>(b_begin) * row,
                     static_cast<size_t>(end - begin) * row) == 0;
}

struct PooledBackend {
  std::unique_ptr<ThreadPool> pool;
  std::unique_ptr<ComputeBackend> backend;
  ComputeBackend* operator->() const { return backend.get(); }
};
inline PooledBackend MakeBackend(const std::string& isa, int threads) {
  PooledBackend b;
  b.pool = std::make_unique<ThreadPool>(threads);
  std::string error;
  b.backend = MakeCpuBackend(b.pool.get(), isa, &error);
  SY_CHECK(b.backend != nullptr);
  return b;
}

// Runs a test once per instruction path that this CPU offers.
class EveryPath : public ::testing::TestWithParam<std::string> {};
#define SY_EVERY_PATH(suite)                                                               \
  INSTANTIATE_TEST_SUITE_P(Paths, suite, ::testing::ValuesIn(::switchyard::CpuIsaPaths()), \
                           [](const auto& path) { return path.param; })

inline const DType kActs[] = {DType::kF32, DType::kBF16};

}  // namespace switchyard::testing
