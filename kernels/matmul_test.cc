// Matrix products and the grouped MLP against the reference, and their rows' independence, on every
// path.
#include <numeric>

#include "kernels/test_support.h"

namespace switchyard::testing {
namespace {

using reference::Matrix;

class MatmulTest : public EveryPath {};
SY_EVERY_PATH(MatmulTest);

struct Shape {
  int64_t m, k, n;
};

void CheckMatmul(ComputeBackend& backend, Random& random, const Shape& s, DType act, DType out_type,
                 bool with_bias) {
  const Guarded x = random.Normal(act, {s.m, s.k});
  const Guarded w = random.Normal(act, {s.n, s.k});
  const Guarded bias = random.Normal(DType::kF32, {s.n});
  const PackedMatrix packed = backend.Pack(w.t(), FormatOf(act));
  const Guarded out(out_type, {s.m, s.n});
  backend.Matmul(x.t(), packed, with_bias ? bias.t().as<float>() : nullptr, out.t());
  const Matrix wx = reference::Widen(x.t()), ww = reference::Widen(w.t());
  const std::span<const float> b(bias.t().as<float>(), static_cast<size_t>(with_bias ? s.n : 0));
  Matrix magnitude = reference::MatmulMagnitude(wx, ww);
  for (double& v : magnitude.values) v += 4.0;  // the bias
  ExpectClose(out.t(), reference::Matmul(wx, ww, b),
              "m " + std::to_string(s.m) + " k " + std::to_string(s.k) + " n " +
                  std::to_string(s.n) + " " + DTypeName(act) + " to " + DTypeName(out_type),
              &magnitude);
}

TEST_P(MatmulTest, EdgeShapes) {
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  Random random(1);
  for (DType act : kActs)
    for (int64_t m : {1, 2, 3, 5, 6, 7, 8, 9, 13, 17, 97})
      for (int64_t k : {1, 2, 7, 24, 56, 511, 513})
        for (int64_t n : {1, 15, 16, 17, 56, 100})
          CheckMatmul(*backend.backend, random, {m, k, n}, act, act, m % 2 == 0);
}

TEST_P(MatmulTest, RandomShapes) {
  const PooledBackend backend = MakeBackend(GetParam(), 3);
  Random random(TestSeed());
  for (int i = 0; i < 60; ++i) {
    const DType act = kActs[random.Int(0, 1)];
    CheckMatmul(*backend.backend, random,
                {random.Int(1, 130), random.Int(1, 1200), random.Int(1, 200)}, act,
                random.Int(0, 1) == 0 ? DType::kF32 : act, random.Int(0, 1) == 0);
  }
}

// MatmulArgmax gives what Matmul and Sample give: equal logits in distant columns, rows of -inf,
// NaN and infinity among them.
TEST_P(MatmulTest, ArgmaxIsWhatSampleTakes) {
  Random random(TestSeed());
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const WeightFormat formats[] = {FormatOf(DType::kF32), FormatOf(DType::kBF16), kInt8Weights,
                                  kInt4Weights};
  for (int turn = 0; turn < 80; ++turn) {
    const PooledBackend backend = MakeBackend(GetParam(), static_cast<int>(random.Int(1, 3)));
    const WeightFormat& format = formats[turn % 4];
    const DType act = format.type == WeightType::kBF16 ? DType::kBF16 : DType::kF32;
    const int64_t m = random.Int(1, 40), k = random.Int(1, 300), n = random.Int(1, 3000);
    const Guarded x = random.Normal(act, {m, k});
    const Guarded w = random.Normal(DType::kF32, {n, k});
    float* const weights = w.t().as<float>();
    for (int i = 0; i < 40; ++i) {  // columns that are equal and often the highest
      const int64_t from = random.Int(0, n - 1), to = random.Int(0, n - 1);
      for (int64_t j = 0; j < k; ++j) weights[from * k + j] *= i % 4 == 0 ? 3.0f : 1.0f;
      std::copy_n(weights + from * k, k, weights + to * k);
    }
    if (turn % 8 >= 4 && act == DType::kF32) {
      const float planted[] = {kInfinity, -kInfinity, std::nanf(""), 3e38f};
      x.t().as<float>()[random.Int(0, m * k - 1)] = planted[random.Int(0, 3)];
      if (!IsQuantized(format)) weights[random.Int(0, n * k - 1)] = planted[random.Int(0, 3)];
    }
    PackedMatrix packed;
    if (act == DType::kBF16) {
      const Guarded narrow(act, {n, k});
      for (int64_t i = 0; i < n * k; ++i) narrow.t().as<bf16>()[i] = ToBF16(weights[i]);
      packed = backend->Pack(narrow.t(), format);
    } else {
      packed = backend->Pack(w.t(), format);
    }
    const Guarded logits(DType::kF32, {m, n});
    backend->Matmul(x.t(), packed, nullptr, logits.t());
    SamplingRow greedy;
    greedy.temperature = 0.0f;
    ASSERT_TRUE(greedy.IsArgmax());
    const std::vector<SamplingRow> rows(static_cast<size_t>(m), greedy);
    std::vector<SampledToken> want(static_cast<size_t>(m)), got(static_cast<size_t>(m));
    backend->Sample(logits.t(), rows, want);
    backend->MatmulArgmax(x.t(), packed, got);
    for (size_t r = 0; r < got.size(); ++r) {
      ASSERT_EQ(got[r].finite, want[r].finite) << "turn " << turn << " row " << r;
      ASSERT_EQ(got[r].token, want[r].token) << "turn " << turn << " row " << r;
    }
  }
}

// A row whose logits are all -inf has no token; neither has one with a NaN.
TEST_P(MatmulTest, ArgmaxOfNothing) {
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (int64_t n : {1, 5, 16, 17, 1000}) {
    const Guarded w(DType::kF32, {n, 3}), x(DType::kF32, {3, 3});
    std::fill_n(w.t().as<float>(), n * 3, 1.0f);
    std::fill_n(x.t().as<float>(), 9, 1.0f);
    x.t().as<float>()[1] = -std::numeric_limits<float>::infinity();
    x.t().as<float>()[8] = std::nanf("");
    const PackedMatrix packed = backend->Pack(w.t(), FormatOf(DType::kF32));
    std::vector<SampledToken> got(3);
    backend->MatmulArgmax(x.t(), packed, got);
    const std::pair<int32_t, bool> want[] = {{-1, false}, {0, true}, {-1, false}};
    for (size_t r = 0; r < 3; ++r) {
      EXPECT_EQ(got[r].token, want[r].first) << "row " << r << " of " << n << " columns";
      EXPECT_EQ(got[r].finite, want[r].second) << "row " << r << " of " << n << " columns";
    }
  }
}

// Several products of one input, of weights in different formats, are those of one call each.
TEST_P(MatmulTest, ProductsOfOneInput) {
  Random random(5);
  constexpr int64_t kInputs = 140;
  for (int64_t rows : {1, 9, 40}) {
    const PooledBackend backend = MakeBackend(GetParam(), 2);
    const Guarded x = random.Normal(DType::kBF16, {rows, kInputs});
    const Guarded bias = random.Normal(DType::kF32, {100});
    std::vector<PackedMatrix> packed;
    std::vector<Guarded> outs, wants;
    const WeightFormat bf16_weights = FormatOf(DType::kBF16);
    const std::pair<int64_t, WeightFormat> matrices[] = {{100, bf16_weights}, {17, bf16_weights},
                                                         {40, kInt8Weights},  {33, kInt4Weights},
                                                         {100, kInt4Weights}, {5, bf16_weights}};
    for (const auto& [n, format] : matrices) {
      packed.push_back(backend->Pack(random.Normal(DType::kBF16, {n, kInputs}).t(), format));
      outs.emplace_back(DType::kF32, std::initializer_list<int64_t>{rows, n});
      wants.emplace_back(DType::kF32, std::initializer_list<int64_t>{rows, n});
    }
    std::vector<ComputeBackend::Product> products;
    for (size_t i = 0; i < packed.size(); ++i) {
      const float* b = packed[i].n == 100 ? bias.t().as<float>() : nullptr;
      products.push_back({.w = &packed[i], .bias = b, .out = outs[i].t()});
      backend->Matmul(x.t(), packed[i], b, wants[i].t());
    }
    backend->Matmul(x.t(), products);
    for (size_t i = 0; i < packed.size(); ++i)
      EXPECT_TRUE(SameRows(wants[i].t(), 0, rows, outs[i].t(), 0)) << "product " << i;
  }
}

TEST_P(MatmulTest, RowsDoNotDependOnTheBatchOrThreads) {
  Random random(2);
  constexpr int64_t kRows = 33;
  for (DType act : kActs) {
    for (const Shape& s : {Shape{kRows, 1030, 100}, Shape{kRows, 57, 2000}}) {
      const Guarded x = random.Normal(act, {s.m, s.k});
      const Guarded w = random.Normal(act, {s.n, s.k});
      const Guarded want(act, {s.m, s.n});
      const PooledBackend first = MakeBackend(GetParam(), 1);
      first->Matmul(x.t(), first->Pack(w.t(), FormatOf(act)), nullptr, want.t());
      for (int threads : {1, 2, 5}) {
        const PooledBackend backend = MakeBackend(GetParam(), threads);
        const PackedMatrix packed = backend->Pack(w.t(), FormatOf(act));
        for (int64_t size = 1; size <= kRows; ++size) {
          for (int64_t begin = 0; begin + size <= kRows; begin += size == 1 ? 1 : 7) {
            const Guarded out(act, {size, s.n});
            backend->Matmul(x.Rows(begin, begin + size), packed, nullptr, out.t());
            ASSERT_TRUE(SameRows(want.t(), begin, begin + size, out.t(), 0))
                << DTypeName(act) << " rows " << begin << " + " << size << ", " << threads
                << " threads";
          }
        }
      }
    }
  }
}

struct Expert {
  Guarded gate, up, down;
  MlpWeights packed;
};

Expert MakeExpert(ComputeBackend& backend, Random& random, int64_t hidden, int64_t width,
                  DType act) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(hidden));
  Expert e{random.Normal(act, {width, hidden}, scale),
           random.Normal(act, {width, hidden}, scale),
           random.Normal(act, {hidden, width}, scale),
           {}};
  e.packed = backend.PackMlp(e.gate.t(), e.up.t(), e.down.t(), FormatOf(act));
  return e;
}

void ExpectMlp(const Expert& e, const Tensor& x, const Tensor& out, const std::string& what) {
  const Matrix wx = reference::Widen(x), gate = reference::Widen(e.gate.t()),
               up = reference::Widen(e.up.t()), down = reference::Widen(e.down.t());
  const Matrix magnitude = reference::GatedMlpMagnitude(wx, gate, up, down);
  // The rounding of the hidden row may fall the other way: twice the bound of one rounding.
  ExpectClose(out, reference::GatedMlp(wx, gate, up, down, x.dtype), what, &magnitude, 2.0);
}

// Widths differ between experts, some experts have no rows, and rows outside all groups must stay
// as they were.
TEST_P(MatmulTest, GroupedMlpMatchesReference) {
  Random random(TestSeed());
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (DType act : kActs) {
    for (int64_t hidden : {7, 64, 100, 520}) {
      std::vector<Expert> experts;
      for (int64_t width : {1, 16, 24, 56, 100})
        experts.push_back(MakeExpert(*backend.backend, random, hidden, width, act));
      std::vector<MlpGroup> groups;
      int64_t rows = 2;  // two rows in front belong to nobody
      for (const Expert& e : experts) {
        const int64_t count = random.Int(0, 1) == 0 ? random.Int(0, 3) : random.Int(4, 40);
        groups.push_back({.weights = &e.packed, .begin = rows, .end = rows + count});
        rows += count;
      }
      rows += 1;
      const Guarded x = random.Normal(act, {rows, hidden});
      const Guarded out(act, {rows, hidden});
      backend->GroupedMlp(x.t(), groups, out.t());
      for (size_t g = 0; g < groups.size(); ++g) {
        if (groups[g].begin == groups[g].end) continue;
        const int64_t begin = groups[g].begin, end = groups[g].end;
        ExpectMlp(experts[g], x.Rows(begin, end), out.Rows(begin, end),
                  "group " + std::to_string(g));
      }
      for (int64_t r : {int64_t{0}, int64_t{1}, rows - 1}) {
        const std::byte* row = static_cast<const std::byte*>(out.Rows(r, r + 1).data);
        for (size_t i = 0; i < static_cast<size_t>(hidden) * DTypeSize(act); ++i)
          ASSERT_EQ(row[i], std::byte{Guarded::kByte}) << "row " << r;
      }
    }
  }
}

TEST_P(MatmulTest, GroupedMlpRowsDoNotDependOnTheBatchOrThreads) {
  Random random(3);
  constexpr int64_t kRows = 33, kHidden = 136, kWidth = 57;
  for (DType act : kActs) {
    const Guarded x = random.Normal(act, {kRows, kHidden});
    const PooledBackend first = MakeBackend(GetParam(), 1);
    const Expert e = MakeExpert(*first.backend, random, kHidden, kWidth, act);
    const Guarded want(act, {kRows, kHidden});
    const MlpGroup all = {.weights = &e.packed, .begin = 0, .end = kRows};
    first->GroupedMlp(x.t(), {&all, 1}, want.t());
    for (int threads : {1, 2, 5}) {
      const PooledBackend backend = MakeBackend(GetParam(), threads);
      for (int64_t size = 1; size <= kRows; ++size) {
        // Groups of `size` rows, all in one call.
        std::vector<MlpGroup> groups;
        for (int64_t r = 0; r < kRows; r += size)
          groups.push_back({.weights = &e.packed, .begin = r, .end = std::min(kRows, r + size)});
        const Guarded out(act, {kRows, kHidden});
        backend->GroupedMlp(x.t(), groups, out.t());
        ASSERT_TRUE(SameRows(want.t(), 0, kRows, out.t(), 0))
            << DTypeName(act) << " groups of " << size << ", " << threads << " threads";
      }
    }
  }
}

TEST_P(MatmulTest, NaNStaysInItsRow) {
  Random random(4);
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  const Guarded x = random.Normal(DType::kF32, {9, 40});
  const Guarded w = random.Normal(DType::kF32, {33, 40});
  const PackedMatrix packed = backend->Pack(w.t(), FormatOf(DType::kF32));
  const Guarded clean(DType::kF32, {9, 33}), out(DType::kF32, {9, 33});
  backend->Matmul(x.t(), packed, nullptr, clean.t());
  x.t().as<float>()[4 * 40 + 11] = NAN;
  backend->Matmul(x.t(), packed, nullptr, out.t());
  EXPECT_TRUE(SameRows(clean.t(), 0, 4, out.t(), 0));
  EXPECT_TRUE(SameRows(clean.t(), 5, 9, out.t(), 5));
  for (int j = 0; j < 33; ++j) EXPECT_TRUE(std::isnan(out.t().as<float>()[4 * 33 + j]));
}

}  // namespace
}  // namespace switchyard::testing
