// WorkerReports: what the workers of a cell say of their work: counters, loads of the experts,
// rows. Totals never fall when a worker goes. Owned by the Cluster, on its thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "scheduler/cluster_snapshot.h"
#include "scheduler/membership.h"
#include "switchyard/v1/control.pb.h"

namespace switchyard {

class WorkerReports {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // num_loads: num_moe_layers * num_experts.
  explicit WorkerReports(size_t num_loads) : loads_(num_loads) {}

  // An expert worker names all loads, an attention worker none; other numbers of them are ignored.
  void Count(WorkerId worker, const v1::MoeStats& stats);
  // It is gone: its counters stay in the totals.
  void Forget(WorkerId worker);

  // [num_moe_layers, num_experts] copies lately: Age halves them.
  std::span<const int64_t> loads() const { return loads_; }
  void Age();

  // Sets counters, balancedness, plan_gap and the rows per second of its workers. REQUIRES: the
  // snapshot names all workers, with their rows.
  void Fill(TimePoint now, ClusterSnapshot* snapshot);

 private:
  struct Rate {
    uint64_t rows = 0;
    TimePoint since;
    double rows_per_s = 0;
  };

  std::vector<int64_t> loads_;
  std::map<std::string, double> departed_;  // counters of the workers that are gone
  std::map<WorkerId, std::map<std::string, double>> counters_;  // as last reported
  std::map<WorkerId, Rate> rates_;
  double balancedness_ = -1, plan_gap_ = -1;  // of the last report with plans
};

}  // namespace switchyard
