// Quantised weights: what packing keeps of them, products and grouped MLPs against float64, and the
// independence of rows, on every path and in every format.
#include "kernels/test_support.h"

namespace switchyard::testing {
namespace {

using reference::Matrix;

class QuantizedTest : public EveryPath {};
SY_EVERY_PATH(QuantizedTest);

std::vector<WeightFormat> AllFormats() {
  std::vector<WeightFormat> formats;
  for (WeightType type : {WeightType::kInt8, WeightType::kInt4})
    for (int32_t group : {32, 128})
      for (bool zeros : {false, true}) formats.push_back({type, group, zeros});
  return formats;
}

// A checkpoint's integers and what they mean.
struct Source {
  Source(Random& random, int64_t n, int64_t k, const WeightFormat& format)
      : groups((k + std::min<int64_t>(format.group, k) - 1) / std::min<int64_t>(format.group, k)),
        values(n, k) {
    const bool is_8bit = format.type == WeightType::kInt8;
    for (int64_t i = 0; i < n * k; ++i)
      codes.push_back(static_cast<uint8_t>(random.Int(0, is_8bit ? 255 : 15)));
    for (int64_t i = 0; i < n * groups; ++i) {
      scales.push_back(static_cast<float>(random.Int(-2047, 2047)) * 0x1p-18f);  // float16 numbers
      if (format.zero_points)
        zeros.push_back(static_cast<uint8_t>(random.Int(0, is_8bit ? 255 : 16)));
    }
    tensor = {.n = n, .k = k, .format = format, .codes = codes, .scales = scales, .zeros = zeros};
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = 0; i < k; ++i) {
        const size_t g = static_cast<size_t>(j * groups + i / format.group);
        const double zero = format.zero_points ? zeros[g] : is_8bit ? 128 : 8;
        values.at(j, i) =
            static_cast<double>(scales[g]) * (codes[static_cast<size_t>(j * k + i)] - zero);
      }
    }
  }
  int64_t groups;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  std::vector<uint8_t> zeros;
  QuantizedTensor tensor;
  Matrix values;
};

TEST_P(QuantizedTest, PackingKeepsIntegersAsTheyAre) {
  const uint64_t seed = TestSeed();
  Random random(seed);
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (WeightFormat format : AllFormats()) {
    for (int32_t group : {32, 64, 96, 128, 256, 1000}) {
      format.group = group;
      for (int64_t k : {1, 8, 31, 64, 130, 384}) {
        const Source source(random, random.Int(1, 40), k, format);
        const PackedMatrix packed = backend->Pack(source.tensor);
        EXPECT_EQ(packed.storage.bytes(), backend->PackedBytes(packed.n, k, packed.format));
        EXPECT_EQ(reference::Unpack(packed).values, source.values.values)
            << WeightFormatName(format) << " k " << k;
        // Byte by byte the same, whatever was in the memory before: workers compare checksums.
        const auto use_memory = [&] {
          const Buffer used(packed.storage.bytes());
          std::memset(used.data(), 0xa5, used.bytes());
        };
        use_memory();
        const PackedMatrix again = backend->Pack(source.tensor);
        EXPECT_EQ(std::memcmp(packed.storage.data(), again.storage.data(), again.storage.bytes()),
                  0)
            << WeightFormatName(format) << " k " << k;
      }
    }
  }
}

TEST_P(QuantizedTest, QuantisingStaysWithinHalfAStep) {
  Random random(TestSeed());
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (const WeightFormat& format : AllFormats()) {
    if (format.zero_points) continue;
    for (DType type : kActs) {
      for (int64_t k : {1, 33, 128, 500}) {
        const Guarded w = random.Normal(type, {19, k}, 0.02f);
        const Matrix want = reference::Widen(w.t());
        const Matrix got = reference::Unpack(backend->Pack(w.t(), format));
        double error = 0.0, power = 0.0;
        for (int64_t j = 0; j < 19; ++j) {
          for (int64_t i = 0; i < k; ++i) {
            double largest = 0.0;
            const int64_t k0 = i / format.group * format.group;
            for (int64_t g = k0; g < std::min<int64_t>(k, k0 + format.group); ++g)
              largest = std::max(largest, std::fabs(want.at(j, g)));
            const double e = std::fabs(got.at(j, i) - want.at(j, i));
            // int4 may clip its largest weight by up to 1.5 + 0.5 steps of largest / 7. A scale
            // below 2^-14 is a multiple of 2^-24, half of which times 127 is lost.
            const double step = largest / (format.type == WeightType::kInt8 ? 127 : 7);
            EXPECT_LE(e, (format.type == WeightType::kInt8 ? 0.51 : 2.0) * step + 127 * 0x1p-25);
            error += e * e;
            power += want.at(j, i) * want.at(j, i);
          }
        }
        const double bound = format.type == WeightType::kInt8 ? 1e-4
                             : format.group == 32             ? 9e-3
                                                              : 2e-2;
        EXPECT_LE(error, bound * power) << WeightFormatName(format) << " k " << k;
      }
    }
  }
}

// A matrix of a format, however it can be made.
PackedMatrix AnyMatrix(ComputeBackend& backend, Random& random, int64_t n, int64_t k,
                       const WeightFormat& format) {
  if (!format.zero_points && random.Int(0, 1) == 0)
    return backend.Pack(random.Normal(DType::kBF16, {n, k}).t(), format);
  return backend.Pack(Source(random, n, k, format).tensor);
}

// In float32 against the reference; in bfloat16 it is the same number, rounded.
void CheckMatmul(ComputeBackend& backend, Random& random, const WeightFormat& format, int64_t m,
                 int64_t k, int64_t n) {
  const Guarded x = random.Normal(kActs[random.Int(0, 1)], {m, k});
  const Guarded bias = random.Normal(DType::kF32, {n});
  const PackedMatrix packed = AnyMatrix(backend, random, n, k, format);
  const Guarded out(DType::kF32, {m, n}), rounded(DType::kBF16, {m, n});
  backend.Matmul(x.t(), packed, bias.t().as<float>(), out.t());
  backend.Matmul(x.t(), packed, bias.t().as<float>(), rounded.t());
  const Matrix rows = reference::QuantizeRows(reference::Widen(x.t()));
  const Matrix weights = reference::Unpack(packed);
  Matrix magnitude = reference::MatmulMagnitude(rows, weights);
  for (double& v : magnitude.values) v += 4.0;  // the bias
  const std::string what = WeightFormatName(format) + " m " + std::to_string(m) + " k " +
                           std::to_string(k) + " n " + std::to_string(n) + " " +
                           DTypeName(x.t().dtype);
  ExpectClose(out.t(),
              reference::Matmul(rows, weights, {bias.t().as<float>(), static_cast<size_t>(n)}),
              what, &magnitude);
  for (int64_t i = 0; i < m * n; ++i) {
    ASSERT_EQ(rounded.t().as<bf16>()[i].bits, ToBF16(out.t().as<float>()[i]).bits) << what;
  }
}

TEST_P(QuantizedTest, EdgeShapes) {
  Random random(TestSeed());
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (const WeightFormat& format : AllFormats())
    for (int64_t m : {1, 2, 3, 5, 6, 7, 8, 9, 17})
      for (int64_t k : {1, 3, 4, 5, 31, 32, 33, 100, 127, 128, 129, 516})
        for (int64_t n : {1, 16, 17, 100}) CheckMatmul(*backend.backend, random, format, m, k, n);
}

TEST_P(QuantizedTest, RandomShapes) {
  Random random(TestSeed());
  const PooledBackend backend = MakeBackend(GetParam(), 3);
  for (const WeightFormat& format : AllFormats())
    for (int i = 0; i < 12; ++i)
      CheckMatmul(*backend.backend, random, format, random.Int(1, 130), random.Int(1, 2600),
                  random.Int(1, 200));
}

// The largest codes everywhere: nothing may saturate or overflow.
TEST_P(QuantizedTest, ExtremeCodesAreExact) {
  Random random(1);
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (const WeightFormat& format : AllFormats()) {
    for (uint8_t code : {uint8_t{0}, uint8_t{255}}) {
      constexpr int64_t kK = 384, kN = 20, kM = 9;
      Source source(random, kN, kK, format);
      std::fill(source.codes.begin(), source.codes.end(),
                format.type == WeightType::kInt8 ? code : code & 15);
      std::fill(source.scales.begin(), source.scales.end(), 1.0f);
      std::fill(source.zeros.begin(), source.zeros.end(), uint8_t{0});
      const Guarded x(DType::kF32, {kM, kK}), out(DType::kF32, {kM, kN});
      for (int64_t i = 0; i < x.t().numel(); ++i)
        x.t().as<float>()[i] = (i / kK) % 2 == 0 ? 127.0f : -127.0f;
      const PackedMatrix packed = backend->Pack(source.tensor);
      backend->Matmul(x.t(), packed, nullptr, out.t());
      const Matrix want = reference::Matmul(reference::Widen(x.t()), reference::Unpack(packed), {});
      EXPECT_EQ(reference::Widen(out.t()).values, want.values) << WeightFormatName(format);
    }
  }
}

TEST_P(QuantizedTest, RowsDoNotDependOnTheBatchOrThreads) {
  Random random(TestSeed());
  constexpr int64_t kRows = 35;
  for (const WeightFormat& format : AllFormats()) {
    for (const auto& [k, n] : {std::pair<int64_t, int64_t>{1100, 70}, {90, 1000}}) {
      const Guarded x = random.Normal(DType::kBF16, {kRows, k});
      const PooledBackend first = MakeBackend(GetParam(), 1);
      const PackedMatrix packed = AnyMatrix(*first.backend, random, n, k, format);
      const Guarded want(DType::kF32, {kRows, n});
      first->Matmul(x.t(), packed, nullptr, want.t());
      for (int threads : {1, 2, 5}) {
        const PooledBackend backend = MakeBackend(GetParam(), threads);
        for (int64_t size = 1; size <= kRows; size += size < 20 ? 1 : 5) {
          for (int64_t begin = 0; begin + size <= kRows; begin += size == 1 ? 1 : 7) {
            const Guarded out(DType::kF32, {size, n});
            backend->Matmul(x.Rows(begin, begin + size), packed, nullptr, out.t());
            ASSERT_TRUE(SameRows(want.t(), begin, begin + size, out.t(), 0))
                << WeightFormatName(format) << " rows " << begin << " + " << size << ", " << threads
                << " threads";
          }
        }
      }
    }
  }
}

MlpWeights AnyMlp(ComputeBackend& backend, Random& random, int64_t hidden, int64_t width,
                  const WeightFormat& format) {
  if (format.zero_points) {
    return backend.PackMlp(Source(random, width, hidden, format).tensor,
                           Source(random, width, hidden, format).tensor,
                           Source(random, hidden, width, format).tensor);
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(hidden));
  return backend.PackMlp(random.Normal(DType::kF32, {width, hidden}, scale).t(),
                         random.Normal(DType::kF32, {width, hidden}, scale).t(),
                         random.Normal(DType::kF32, {hidden, width}, scale).t(), format);
}

// The hidden row's codes may fall the other way where float32 and float64 differ: the magnitude
// allows two of them in each row.
void ExpectMlp(const MlpWeights& w, const Tensor& x, const Tensor& out, const std::string& what) {
  const Matrix rows = reference::QuantizeRows(reference::Widen(x));
  const Matrix gate = reference::Unpack(w.gate_up, 2, 0), up = reference::Unpack(w.gate_up, 2, 1),
               down = reference::Unpack(w.down);
  const Matrix hidden = reference::RoundTo(reference::GatedHidden(rows, gate, up), DType::kF32);
  const Matrix quantized = reference::QuantizeRows(hidden);
  Matrix magnitude = reference::GatedMlpMagnitude(rows, gate, up, down);
  for (int64_t r = 0; r < magnitude.rows; ++r) {
    double largest = 0.0;
    for (int64_t i = 0; i < hidden.columns; ++i)
      largest = std::max(largest, std::fabs(hidden.at(r, i)));
    for (int64_t j = 0; j < magnitude.columns; ++j) {
      double weight = 0.0;
      for (int64_t i = 0; i < down.columns; ++i)
        weight = std::max(weight, std::fabs(down.at(j, i)));
      magnitude.at(r, j) += 2 * largest / 127 * weight / RelativeBound(out.dtype);
    }
  }
  ExpectClose(out, reference::Matmul(quantized, down, {}), what, &magnitude);
}

TEST_P(QuantizedTest, GroupedMlpMatchesReference) {
  Random random(TestSeed());
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (DType act : kActs) {
    for (int64_t hidden : {7, 64, 100, 520}) {
      std::vector<MlpWeights> experts;
      for (const WeightFormat& format : AllFormats())  // in one call
        experts.push_back(AnyMlp(*backend.backend, random, hidden, random.Int(1, 300), format));
      std::vector<MlpGroup> groups;
      int64_t rows = 0;
      for (const MlpWeights& e : experts) {
        const int64_t count = random.Int(0, 1) == 0 ? random.Int(0, 3) : random.Int(4, 60);
        groups.push_back({.weights = &e, .begin = rows, .end = rows + count});
        rows += count;
      }
      const Guarded x = random.Normal(act, {rows + 1, hidden});
      const Guarded out(act, {rows + 1, hidden});
      backend->GroupedMlp(x.t(), groups, out.t());
      for (const MlpGroup& g : groups) {
        if (g.begin == g.end) continue;
        ExpectMlp(*g.weights, x.Rows(g.begin, g.end), out.Rows(g.begin, g.end),
                  WeightFormatName(g.weights->down.format) + " hidden " + std::to_string(hidden) +
                      " width " + std::to_string(g.weights->width));
      }
    }
  }
}

TEST_P(QuantizedTest, GroupedMlpRowsDoNotDependOnTheBatchOrThreads) {
  Random random(TestSeed());
  constexpr int64_t kRows = 61, kHidden = 300, kWidth = 200;
  const Guarded x = random.Normal(DType::kBF16, {kRows, kHidden});
  const PooledBackend first = MakeBackend(GetParam(), 1);
  std::vector<MlpWeights> experts;
  for (const WeightFormat& format : AllFormats())
    experts.push_back(AnyMlp(*first.backend, random, kHidden, kWidth, format));
  // Quantised beside not: the hidden row is packed for down's format.
  const Guarded dense = random.Normal(DType::kBF16, {kHidden, kWidth}, 0.1f);
  experts.push_back(AnyMlp(*first.backend, random, kHidden, kWidth, kInt8Weights));
  experts.back().down = first->Pack(dense.t(), FormatOf(DType::kBF16));
  for (const MlpWeights& e : experts) {
    const Guarded want(DType::kBF16, {kRows, kHidden});
    const MlpGroup all = {.weights = &e, .begin = 0, .end = kRows};
    first->GroupedMlp(x.t(), {&all, 1}, want.t());
    for (int threads : {1, 2, 5}) {
      const PooledBackend backend = MakeBackend(GetParam(), threads);
      for (int64_t size : {1, 2, 3, 7, 8, 9, 20, 50}) {
        std::vector<MlpGroup> groups;
        for (int64_t r = 0; r < kRows; r += size)
          groups.push_back({.weights = &e, .begin = r, .end = std::min(kRows, r + size)});
        const Guarded out(DType::kBF16, {kRows, kHidden});
        backend->GroupedMlp(x.t(), groups, out.t());
        ASSERT_TRUE(SameRows(want.t(), 0, kRows, out.t(), 0))
            << WeightFormatName(e.gate_up.format) << " groups of " << size << ", " << threads
            << " threads";
      }
    }
  }
}

TEST_P(QuantizedTest, WhatIsNotFiniteStaysInItsRow) {
  Random random(4);
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (const WeightFormat& format : AllFormats()) {
    const PackedMatrix packed = AnyMatrix(*backend.backend, random, 33, 200, format);
    const Guarded x = random.Normal(DType::kF32, {9, 200});
    const Guarded clean(DType::kF32, {9, 33}), out(DType::kF32, {9, 33});
    backend->Matmul(x.t(), packed, nullptr, clean.t());
    x.t().as<float>()[4 * 200 + 11] = NAN;
    x.t().as<float>()[5 * 200 + 199] = INFINITY;
    std::fill_n(x.t().as<float>() + 6 * 200, 200, 0.0f);
    backend->Matmul(x.t(), packed, nullptr, out.t());
    EXPECT_TRUE(SameRows(clean.t(), 0, 4, out.t(), 0));
    EXPECT_TRUE(SameRows(clean.t(), 7, 9, out.t(), 7));
    for (int j = 0; j < 33; ++j) {
      EXPECT_TRUE(std::isnan(out.t().as<float>()[4 * 33 + j]));
      EXPECT_TRUE(std::isnan(out.t().as<float>()[5 * 33 + j]));
      EXPECT_EQ(out.t().as<float>()[6 * 33 + j], 0.0f);
    }
  }
}

TEST_P(QuantizedTest, AnMlpsBytesCanBeCopied) {
  Random random(TestSeed());
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (const WeightFormat& format : AllFormats()) {
    const MlpWeights from = AnyMlp(*backend.backend, random, 70, 40, format);
    const MlpWeights to = backend->MakeMlp(40, 70, format);
    ASSERT_EQ(from.gate_up.storage.bytes(), to.gate_up.storage.bytes());
    ASSERT_EQ(from.down.storage.bytes(), to.down.storage.bytes());
    EXPECT_TRUE(from.gate_up.format == to.gate_up.format && to.down.format == format);
  }
}

}  // namespace
}  // namespace switchyard::testing
