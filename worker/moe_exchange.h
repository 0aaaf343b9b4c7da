// MoeExchange: the attention side of one MoE layer's exchange: counts to everybody, the plan, rows
// out to the expert ranks, result rows back. All buffers are allocated at construction. Owned by
// one attention worker, used on its thread only; the communicator must outlive it. It knows no
// weights and no sequences.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/dispatch_planner.h"
#include "comm/exchange_layout.h"
#include "comm/expert_placement.h"
#include "kernels/tensor.h"
#include "proto/step_plan.h"

namespace switchyard {

// Backstop of every data wait. Death is decided elsewhere and ends waits by Abort.
constexpr std::chrono::seconds kDataWaitLimit{600};
inline std::chrono::steady_clock::time_point DataDeadline() {
  return std::chrono::steady_clock::now() + kDataWaitLimit;
}

// Rank of an expert worker in the communicator: attention ranks come first.
struct CellRanks {
  int32_t num_attention = 0;
  int32_t num_experts = 0;
  int32_t OfExpert(int32_t expert_rank) const { return num_attention + expert_rank; }
};

// Participants ascending and within the attention ranks; one micro-batch.
absl::Status CheckParticipants(const StepHeader& step, const CellRanks& ranks);

class MoeExchange {
 public:
  MoeExchange(const ExchangeShape& shape, DType act, const CellRanks& ranks,
              std::shared_ptr<const ExpertPlacement> placement, const PlannerOptions& planner,
              Communicator* communicator);

  static int64_t BufferBytes(const ExchangeShape& shape, const CellRanks& ranks);

  // Sends the rows [num_tokens, hidden] act to the experts of `ids` [num_tokens, top_k] (-1: none)
  // and returns while they are away. `rows` is copied. `moe_layer` counts MoE layers only. `step`
  // must live until Await returned.
  absl::Status Dispatch(const StepHeader& step, int32_t moe_layer, std::span<const int32_t> ids,
                        const Tensor& rows);
  // Waits for all results. Then row results() of row_of()[t * top_k + j] is what expert ids[t *
  // top_k + j] made of t.
  absl::Status Await();
  Tensor results() const;  // [rows, hidden] act
  std::span<const int32_t> row_of() const { return lists_.row_of; }

 private:
  absl::Status ExchangeCounts(const StepHeader& step, int32_t source);

  const ExchangeShape shape_;
  const DType act_;
  const CellRanks ranks_;
  Communicator* const communicator_;

  DispatchPlanner planner_;

  // Of the exchange under way.
  ExchangeKey key_;
  int32_t source_ = 0;
  DispatchPlan plan_;
  DispatchLists lists_;
  std::vector<int32_t> counts_;  // [num_participants, num_experts]
  std::vector<SendOp> sends_;
  std::vector<RecvOp> recvs_;
  Buffer counts_message_;
  std::vector<Buffer> counts_received_;    // [num_attention]
  std::vector<Buffer> dispatch_messages_;  // [num_experts ranks]
  Buffer combined_;                        // [MaxCombineRows, hidden] act
};

}  // namespace switchyard
