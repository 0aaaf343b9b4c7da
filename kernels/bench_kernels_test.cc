// Bench kernels runs for a moment on small shapes: every row has its figures.
#include "kernels/bench_kernels.h"

#include <gtest/gtest.h>

#include "kernels/backend.h"

namespace switchyard {
namespace {

TEST(BenchKernelsTest, EveryRowHasItsFigures) {
  int64_t last = 0, all = 0;
  const BenchKernelsOptions options = {.threads = 2,
                                       .isa = "auto",
                                       .seconds = 0,
                                       .hidden = 128,
                                       .width = 64,
                                       .num_experts = 8,
                                       .top_k = 2,
                                       .num_matrices = 2,
                                       .probe_bytes = size_t{4} << 20,
                                       .progress = [&](int64_t done, int64_t total) {
                                         EXPECT_EQ(done, last + 1);
                                         last = done;
                                         all = total;
                                       }};
  BenchKernelsReport report;
  std::string error;
  ASSERT_TRUE(BenchKernels(options, &report, &error)) << error;
  EXPECT_EQ(last, all);
  ASSERT_EQ(static_cast<int64_t>(report.rows.size()), all);
  EXPECT_GT(report.ceilings.dram_gb_per_s, 0);
  EXPECT_GT(report.ceilings.l2_gb_per_s, 0);
  EXPECT_EQ(report.ceilings.fma_gflops > 0, CpuIsaPaths().front() != "portable");
  int compared = 0;
  for (const BenchKernelsRow& row : report.rows) {
    EXPECT_GT(row.us, 0) << row.op;
    EXPECT_GT(row.gflops, 0) << row.op;
    EXPECT_GT(row.share_of_probe, 0) << row.op;
    EXPECT_GE(row.rounds, 5) << row.op;
    if (row.onednn_ratio > 0) ++compared;
  }
  EXPECT_EQ(compared, 16);  // 8 batches of plain products in bfloat16 and int8
  EXPECT_NE(report.Text().find("moe layer"), std::string::npos);
  EXPECT_EQ(report.onednn_has_bf16, report.Text().find("its float32") == std::string::npos);
  EXPECT_NE(report.Json().find("\"op\": \"matmul cached\", \"format\": \"int4/32\""),
            std::string::npos);
}

TEST(BenchKernelsTest, AnUnknownPathIsAnError) {
  BenchKernelsReport report;
  std::string error;
  EXPECT_FALSE(BenchKernels({.isa = "mmx"}, &report, &error));
  EXPECT_NE(error.find("mmx"), std::string::npos);
}

}  // namespace
}  // namespace switchyard
