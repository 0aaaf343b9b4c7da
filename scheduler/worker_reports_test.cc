#include "scheduler/worker_reports.h"

#include <gtest/gtest.h>

#include <initializer_list>
#include <utility>

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

v1::MoeStats Report(std::initializer_list<std::pair<const char*, double>> counters,
                    std::initializer_list<uint64_t> copies) {
  v1::MoeStats stats;
  for (const auto& [name, value] : counters) {
    v1::Counter* counter = stats.add_counters();
    counter->set_name(name);
    counter->set_value(value);
  }
  for (uint64_t c : copies) stats.add_expert_copies(c);
  return stats;
}

TEST(WorkerReports, TotalsOutliveTheWorkers) {
  WorkerReports reports(2);
  reports.Count(1, Report({{"rows", 5}}, {1, 2}));
  reports.Count(2, Report({{"rows", 7}}, {}));
  reports.Forget(1);
  reports.Count(2, Report({{"rows", 9}}, {}));
  ClusterSnapshot snapshot;
  reports.Fill(Clock::now(), &snapshot);
  EXPECT_EQ(snapshot.counters.at("rows"), 14);
}

TEST(WorkerReports, LoadsAddUpAndAge) {
  WorkerReports reports(2);
  reports.Count(1, Report({}, {8, 2}));
  reports.Count(2, Report({}, {4, 0}));
  reports.Count(2, Report({{"rows", 3}}, {1, 1, 1}));  // of another model: ignored
  EXPECT_EQ(reports.loads()[0], 12);
  EXPECT_EQ(reports.loads()[1], 2);
  reports.Age();
  EXPECT_EQ(reports.loads()[0], 6);
  ClusterSnapshot snapshot;
  reports.Fill(Clock::now(), &snapshot);
  EXPECT_FALSE(snapshot.counters.contains("rows"));
}

TEST(WorkerReports, PlansAreThoseSinceTheReportBefore) {
  WorkerReports reports(1);
  ClusterSnapshot snapshot;
  reports.Fill(Clock::now(), &snapshot);
  EXPECT_LT(snapshot.balancedness, 0) << "no plans yet";
  reports.Count(1, Report({{"plans", 10}, {"balancedness_sum", 5}, {"plan_gap_sum", 1}}, {1}));
  reports.Count(1, Report({{"plans", 12}, {"balancedness_sum", 7}, {"plan_gap_sum", 1}}, {1}));
  reports.Fill(Clock::now(), &snapshot);
  EXPECT_EQ(snapshot.balancedness, 1);
  EXPECT_EQ(snapshot.plan_gap, 0);
}

TEST(WorkerReports, RowsPerSecondOverAWindow) {
  WorkerReports reports(1);
  ClusterSnapshot snapshot;
  snapshot.workers.resize(1);
  snapshot.workers[0].id = 3;
  snapshot.workers[0].rows = 100;
  const Clock::time_point start = Clock::now();
  reports.Fill(start, &snapshot);
  snapshot.workers[0].rows = 300;
  reports.Fill(start + std::chrono::seconds(2), &snapshot);
  EXPECT_DOUBLE_EQ(snapshot.workers[0].rows_per_s, 100);
  snapshot.workers[0].rows = 301;
  reports.Fill(start + std::chrono::milliseconds(2100), &snapshot);
  EXPECT_DOUBLE_EQ(snapshot.workers[0].rows_per_s, 100) << "not before the next window";
}

}  // namespace
}  // namespace switchyard
