#include "scheduler/worker_reports.h"

#include <algorithm>

namespace switchyard {
namespace {

constexpr size_t kMaxCounters = 64;  // of one worker
constexpr auto kRateWindow = std::chrono::seconds(1);
constexpr uint64_t kMaxCopies = uint64_t{1} << 40;  // of one expert in one report

}  // namespace

void WorkerReports::Count(WorkerId worker, const v1::MoeStats& stats) {
  const auto num_loads = static_cast<size_t>(stats.expert_copies_size());
  if (num_loads != 0 && num_loads != loads_.size()) return;
  std::map<std::string, double>& now = counters_[worker];
  const std::map<std::string, double> before = now;
  for (const v1::Counter& counter : stats.counters()) {
    if (now.size() < kMaxCounters || now.count(counter.name()) > 0)
      now[counter.name()] = counter.value();
  }
  if (num_loads == 0) return;
  for (size_t i = 0; i < num_loads; ++i) {
    loads_[i] += static_cast<int64_t>(
        std::min<uint64_t>(stats.expert_copies(static_cast<int>(i)), kMaxCopies));
  }
  const auto rise = [&](const char* name) {
    const auto last = before.find(name);
    return now[name] - (last == before.end() ? 0 : last->second);
  };
  // Every rank makes the same plans: any report speaks for all.
  const double plans = rise("plans");
  if (plans <= 0) return;
  balancedness_ = rise("balancedness_sum") / plans;
  plan_gap_ = rise("plan_gap_sum") / plans;
}

void WorkerReports::Forget(WorkerId worker) {
  for (const auto& [name, value] : counters_[worker]) {
    if (departed_.size() < kMaxCounters || departed_.count(name) > 0) departed_[name] += value;
  }
  counters_.erase(worker);
  rates_.erase(worker);
}

void WorkerReports::Age() {
  for (int64_t& load : loads_) load /= 2;
}

void WorkerReports::Fill(TimePoint now, ClusterSnapshot* snapshot) {
  snapshot->counters = departed_;
  for (const auto& [worker, reported] : counters_) {
    for (const auto& [name, value] : reported) snapshot->counters[name] += value;
  }
  snapshot->balancedness = balancedness_;
  snapshot->plan_gap = plan_gap_;
  for (ClusterSnapshot::Worker& worker : snapshot->workers) {
    Rate& rate = rates_[worker.id];
    if (now - rate.since >= kRateWindow) {
      const double seconds = std::chrono::duration<double>(now - rate.since).count();
      rate.rows_per_s = static_cast<double>(worker.rows - rate.rows) / seconds;
      rate.rows = worker.rows;
      rate.since = now;
    }
    worker.rows_per_s = rate.rows_per_s;
  }
}

}  // namespace switchyard
