// The memory of one process that hosts workers, decided before it serves: weights, KV cache and
// buffers are summed and compared with what is available; too little is an error with the sum.
// Pure functions; any thread.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "comm/exchange_layout.h"
#include "kernels/backend.h"
#include "worker/model_facts.h"
#include "worker/moe_exchange.h"

namespace switchyard {

constexpr int kMaxBatchedTokens = 1 << 20;  // rows of a step over all participants

struct MemoryUse {
  int32_t attention_workers = 0;     // in this process
  int32_t expert_workers = 0;        // in this process
  int64_t expert_weights_bytes = 0;  // of all its expert workers
  int64_t kv_bytes = 0;              // of all its attention workers
  CellRanks ranks;                   // of the cell: there are buffers per peer
  int32_t max_rows = 0;              // of a step
  int32_t threads = 0;               // of the process's compute pool
  int64_t eager_bytes = 0;           // what a peer may send a rank that did not ask for it yet
  int64_t recorder_bytes = 0;        // of the routing recorder, if there is one
};

// What `use` leaves of `available_bytes`. kResourceExhausted, with the numbers, when it is more;
// kInvalidArgument when such steps cannot be numbered. `backend`: one like
// those of its workers.
absl::StatusOr<int64_t> MemoryLeft(const OpenedModel& model, const MemoryUse& use,
                                   const ComputeBackend& backend, int64_t available_bytes);

// Foreign slots hold any expert of their layer, so its experts must have one format.
// kInvalidArgument, naming the layer, when they have not and there are slots.
absl::Status CheckForeignSlots(const OpenedModel& model, int32_t foreign_slots);
// The format of each MoE layer's foreign slots: of its first expert.
std::vector<WeightFormat> SlotFormats(const OpenedModel& model);

// What the rows of this model's exchange look like.
ExchangeShape MakeExchangeShape(const OpenedModel& model, int32_t max_rows);

}  // namespace switchyard
