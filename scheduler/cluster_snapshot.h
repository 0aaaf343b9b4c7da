// ClusterSnapshot: what people may see of the workers of a cell. A plain value, taken by any
// thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace switchyard {

struct ClusterSnapshot {
  struct Worker {
    uint64_t id = 0;
    std::string role;  // "attention", "expert"
    std::string name;
    int32_t pid = 0;
    std::string address;    // where its control connection comes from
    std::string transport;  // of the data plane, e.g. "tcp"; "in-process"
    std::string device;
    int32_t threads = 0;
    int64_t memory_bytes = 0;
    std::string state;        // "loading", "ready", "serving", "draining"
    int32_t rank = -1;        // in the epoch; -1: not a member
    int32_t num_experts = 0;  // replicas held in the epoch, over all layers
    int32_t num_kv_blocks = 0;
    uint64_t rows = 0;  // since its start: positions (attention), (token, expert) copies (expert)
    double rows_per_s = 0;  // over the last seconds
    double heartbeat_age_s = 0;
  };
  bool networked = false;  // the workers are other processes
  uint64_t epoch = 0;      // the newest; 0: none yet
  std::string phase;       // "running", or on its way there
  std::string waits_for;   // why no cell runs; empty while one does
  std::vector<Worker> workers;
  // Totals of all workers since the cell's start, the gone ones included, by name (proto
  // control.proto, MoeStats; worker/role_session.cc lists them).
  std::map<std::string, double> counters;
  // Of the plans of the last seconds: mean(rank) / max(rank) copies, and tau / lower bound - 1.
  // Negative: there were none.
  double balancedness = -1;
  double plan_gap = -1;
  uint64_t joins = 0;
  uint64_t failures = 0;    // workers declared dead
  uint64_t drains = 0;      // workers that left
  uint64_t failovers = 0;   // epochs that ended by a death or an error
  uint64_t rebalances = 0;  // placements changed to even out the load
  uint64_t refusals = 0;    // registrations
};

}  // namespace switchyard
