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
};

}  // namespace switchyard
