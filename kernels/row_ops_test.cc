// Norm, rotary embedding, embedding, combine, add and sigmoid against the reference, row by row, on
// every path.
#include "kernels/test_support.h"

namespace switchyard::testing {
namespace {

using reference::Matrix;

class RowOpsTest : public EveryPath {};
SY_EVERY_PATH(RowOpsTest);

constexpr int64_t kDims[] = {1, 7, 15, 16, 17, 24, 56, 100, 2048};

TEST_P(RowOpsTest, RmsNorm) {
  Random random(TestSeed());
  for (int threads : {1, 2, 5}) {
    const PooledBackend backend = MakeBackend(GetParam(), threads);
    for (DType out_type : kActs) {
      for (int64_t dim : kDims) {
        const int64_t rows = random.Int(1, 33);
        const Guarded x = random.Normal(DType::kF32, {rows, dim}, random.Float(0.01f, 100.0f));
        const Guarded w = random.Normal(DType::kF32, {dim});
        const Guarded out(out_type, {rows, dim});
        backend->RmsNorm(x.t(), w.t(), 1e-6f, out.t());
        ExpectClose(out.t(),
                    reference::RmsNorm(reference::Widen(x.t()),
                                       {w.t().as<float>(), static_cast<size_t>(dim)}, 1e-6),
                    "dim " + std::to_string(dim));
        for (int64_t r = 0; r < rows; ++r) {
          const Guarded alone(out_type, {1, dim});
          backend->RmsNorm(x.Rows(r, r + 1), w.t(), 1e-6f, alone.t());
          ASSERT_TRUE(SameRows(out.t(), r, r + 1, alone.t(), 0));
        }
        if (out_type == DType::kF32) {
          backend->RmsNorm(x.t(), w.t(), 1e-6f, x.t());  // in place
          ASSERT_TRUE(SameRows(out.t(), 0, rows, x.t(), 0));
        }
      }
    }
  }
}

TEST_P(RowOpsTest, Rope) {
  Random random(TestSeed());
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (int64_t head_dim : {2, 16, 24, 56, 128}) {
    for (int64_t half : {head_dim / 2, (head_dim + 3) / 4}) {
      const int64_t rows = random.Int(1, 40), heads = random.Int(1, 5);
      const Guarded x = random.Normal(DType::kF32, {rows, heads, head_dim});
      const Guarded cos = random.Normal(DType::kF32, {50, half}),
                    sin = random.Normal(DType::kF32, {50, half});
      std::vector<int32_t> positions;
      for (int64_t r = 0; r < rows; ++r)
        positions.push_back(static_cast<int32_t>(random.Int(0, 49)));
      const Matrix want =
          reference::Rope(reference::Widen(x.t()), head_dim, reference::Widen(cos.t()),
                          reference::Widen(sin.t()), positions);
      backend->Rope(x.t(), cos.t(), sin.t(), positions);
      ExpectClose(x.t(), want, "head_dim " + std::to_string(head_dim));
    }
  }
}

TEST_P(RowOpsTest, Embed) {
  Random random(5);
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (DType type : kActs) {
    for (int64_t dim : kDims) {
      const Guarded table = random.Normal(type, {11, dim});
      const std::vector<int32_t> ids = {10, 0, 3, 3};
      const Guarded out(DType::kF32, {4, dim});
      backend->Embed(table.t(), ids, out.t());
      const Matrix t = reference::Widen(table.t()), got = reference::Widen(out.t());
      for (int64_t r = 0; r < 4; ++r)
        for (int64_t i = 0; i < dim; ++i)
          ASSERT_EQ(got.at(r, i), t.at(ids[static_cast<size_t>(r)], i));
    }
  }
}

TEST_P(RowOpsTest, CombineAndAdd) {
  Random random(TestSeed());
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  for (DType act : kActs) {
    for (int64_t dim : kDims) {
      for (int32_t top_k : {0, 1, 4, 8}) {
        const int64_t rows = random.Int(1, 20);
        const Guarded residual = random.Normal(DType::kF32, {rows, dim});
        const Guarded experts = random.Normal(act, {rows * top_k + 1, dim});
        const Guarded shared = random.Normal(act, {rows, dim});
        std::vector<int32_t> row_of;
        std::vector<float> weights, gates;
        for (int64_t i = 0; i < rows * top_k; ++i) {
          row_of.push_back(static_cast<int32_t>(random.Int(-1, rows * top_k)));
          weights.push_back(random.Float(0.0f, 1.0f));
        }
        for (int64_t i = 0; i < rows; ++i) gates.push_back(random.Float(0.0f, 1.0f));
        ComputeBackend::CombineArgs args;
        args.residual = residual.t();
        args.expert_rows = &experts.t();
        args.row_of = row_of;
        args.weights = weights;
        args.top_k = top_k;
        const int64_t variant = random.Int(0, 2);
        if (variant > 0) args.shared = &shared.t();
        if (variant > 1) args.shared_gate = gates.data();
        const Matrix s = reference::Widen(shared.t());
        const Matrix want = reference::Combine(
            reference::Widen(residual.t()), reference::Widen(experts.t()), row_of, weights,
            variant > 0 ? &s : nullptr, variant > 1 ? gates.data() : nullptr);
        backend->Combine(args);
        ExpectClose(residual.t(), want, "top_k " + std::to_string(top_k));
        Matrix sum = reference::Widen(residual.t());
        for (size_t i = 0; i < sum.values.size(); ++i) sum.values[i] += s.values[i];
        backend->Add(shared.t(), residual.t());
        ExpectClose(residual.t(), sum, "add");
      }
    }
  }
}

// The order of DESIGN.md section 1 shows where rounding makes it visible.
TEST_P(RowOpsTest, CombineSumsExpertsBeforeTheResidual) {
  const PooledBackend backend = MakeBackend(GetParam(), 1);
  float residual = 1.0f, experts[3] = {0x1p-24f, 0x1p-24f, 0x1p-24f};
  const int32_t row_of[] = {2, -1, 0, 1};
  const float weights[] = {1.0f, 1.0f, 1.0f, 1.0f};
  const Tensor rows(experts, DType::kF32, {3, 1});
  ComputeBackend::CombineArgs args;
  args.residual = Tensor(&residual, DType::kF32, {1, 1});
  args.expert_rows = &rows;
  args.row_of = row_of;
  args.weights = weights;
  args.top_k = 4;
  backend->Combine(args);
  EXPECT_EQ(residual, 1.0f + 0x1p-22f);  // one by one they would all vanish
}

TEST_P(RowOpsTest, Sigmoid) {
  const PooledBackend backend = MakeBackend(GetParam(), 1);
  std::vector<float> x = {0.0f,   -0.0f, 1e-30f, 30.0f, -30.0f,   88.0f,
                          -88.0f, 1e30f, -1e30f, NAN,   INFINITY, -INFINITY};
  for (int i = -2000; i <= 2000; ++i) x.push_back(static_cast<float>(i) * 0.017f);
  const std::vector<float> in = x;
  backend->Sigmoid(Tensor(x.data(), DType::kF32, {static_cast<int64_t>(x.size())}));
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(in[i])) {
      EXPECT_TRUE(std::isnan(x[i]));
      continue;
    }
    const double want = 1.0 / (1.0 + std::exp(-static_cast<double>(in[i])));
    EXPECT_NEAR(static_cast<double>(x[i]), want, 3e-7 * want + 1.2e-38) << "sigmoid " << in[i];
  }
}

// Denormals are flushed on every thread and the caller's own mode comes back.
TEST_P(RowOpsTest, DenormalsAreFlushedAndTheCallersModeRestored) {
  const PooledBackend backend = MakeBackend(GetParam(), 2);
  float x = 1e-39f, residual = 1e-39f;
  backend->Add(Tensor(&x, DType::kF32, {1, 1}), Tensor(&residual, DType::kF32, {1, 1}));
  EXPECT_EQ(residual, 0.0f);
  volatile float tiny = 1e-38f;
  EXPECT_GT(tiny * 0.1f, 0.0f);
}

}  // namespace
}  // namespace switchyard::testing
