#include "worker/bench_rerouting.h"

#include <gtest/gtest.h>

#include <set>

namespace switchyard {
namespace {

BenchReroutingOptions Small() {
  BenchReroutingOptions options;
  options.hidden = 64;
  options.width = 32;
  options.layers = 2;
  options.tokens = {4, 256};
  options.steps = 3;
  options.dtype = "float32";
  options.isa = "portable";
  return options;
}

TEST(BenchRerouting, EveryWorkloadIsMeasuredWithBothPlanners) {
  BenchReroutingOptions options = Small();
  int64_t last = 0;
  options.progress = [&](int64_t done, int64_t total) {
    EXPECT_LE(done, total);
    EXPECT_GE(done, last);
    last = done;
  };
  const auto report = BenchRerouting(options);
  ASSERT_TRUE(report.ok()) << report.status();
  std::set<std::string> names;
  for (const BenchReroutingRow& row : report->rows) {
    names.insert(row.workload);
    EXPECT_GT(row.plain_ms, 0) << row.workload;
    EXPECT_GT(row.auto_ms, 0) << row.workload;
    EXPECT_LE(row.speedup_p25, row.speedup_p75);
    EXPECT_GE(row.plain_max_mean, 1.0);
    EXPECT_GE(row.modelled_speedup, 1.0 - 1e-9) << "auto is never modelled worse";
    EXPECT_GT(row.plain_bytes, 0);
    if (row.idle) {
      EXPECT_EQ(row.moves, 0);
      EXPECT_DOUBLE_EQ(row.modelled_speedup, 1.0);
      EXPECT_DOUBLE_EQ(row.plain_max_mean, row.auto_max_mean);
    }
  }
  EXPECT_EQ(names.size(), 12u);
  EXPECT_EQ(report->rows.size(), 12u);
  EXPECT_EQ(last, 12 * options.steps);
  EXPECT_NE(report->Json().find("\"speedup\""), std::string::npos);
  EXPECT_NE(report->Text().find("speed-up"), std::string::npos);
}

TEST(BenchRerouting, OptionsOutOfRangeAreNamed) {
  BenchReroutingOptions options = Small();
  options.foreign_slots = 0;
  EXPECT_EQ(BenchRerouting(options).status().message(), "foreign slots is 0, not from 1 to 16");
  options = Small();
  options.top_k = 17;
  EXPECT_FALSE(BenchRerouting(options).ok());
  options = Small();
  options.dtype = "int8";
  EXPECT_FALSE(BenchRerouting(options).ok());
}

}  // namespace
}  // namespace switchyard
