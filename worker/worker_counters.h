// WorkerCounters: what a role tells about its work while it works. Written by the worker's owner
// thread, read by any thread (heartbeats, statistics); it outlives the worker objects of an epoch,
// so that totals go on. Totals only rise.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace switchyard {

struct WorkerCounters {
  // num_expert_loads: num_moe_layers * num_experts of an expert worker, else 0.
  explicit WorkerCounters(size_t num_expert_loads = 0) : expert_copies(num_expert_loads) {}

  std::atomic<uint64_t> progress{0};  // layers computed
  std::atomic<uint64_t> rows{0};      // positions computed (attention), copies computed (expert)
  std::atomic<int64_t> steps{0};      // received and not finished
  std::vector<std::atomic<uint64_t>> expert_copies;  // [num_moe_layers * num_experts]
  std::atomic<uint64_t> weight_bytes_read{0};  // an expert's once for all its rows of an exchange

  // Of an expert worker's plans; all ranks of a cell make the same ones.
  std::atomic<uint64_t> plans{0};
  std::atomic<uint64_t> plan_ns{0};           // spent planning
  std::atomic<uint64_t> balancedness_ppm{0};  // sum over plans of mean / max copies of the ranks
  std::atomic<uint64_t> plan_gap_ppm{0};      // sum over plans of tau / lower bound - 1
  // Of this worker's foreign slots.
  std::atomic<uint64_t> weights_received{0};  // experts moved here
  std::atomic<uint64_t> weight_bytes_received{0};
  std::atomic<uint64_t> foreign_copies{0};  // copies computed from a foreign slot
};

}  // namespace switchyard
