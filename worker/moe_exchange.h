// MoeExchange: the attention side of the exchanges of MoE layers: counts to everybody, the plan,
// rows out to the expert ranks, result rows back. One exchange per micro-batch may be under way,
// in the communicator's group of that number. All buffers are allocated at construction. Owned by
// one attention worker, used on its thread only; the communicator must outlive it. It knows no
// weights and no sequences.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
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

// Participants ascending and within the attention ranks; one or two micro-batches.
absl::Status CheckParticipants(const StepHeader& step, const CellRanks& ranks);

class MoeExchange {
 public:
  MoeExchange(const ExchangeShape& shape, DType act, const CellRanks& ranks,
              std::shared_ptr<const ExpertPlacement> placement, const PlannerOptions& planner,
              Communicator* communicator);

  static int64_t BufferBytes(const ExchangeShape& shape, const CellRanks& ranks);

  // Sends the rows [num_tokens, hidden] act of the key's micro-batch to the experts of `ids`
  // [num_tokens, top_k] (-1: none) and returns while they are away. `rows` is copied. The layer
  // counts MoE layers only. All ranks of a step dispatch in the order (layer, micro-batch).
  // *key.step must live until Await of that micro-batch returned.
  absl::Status Dispatch(const ExchangeKey& key, std::span<const int32_t> ids, const Tensor& rows);
  // Waits for all results of a micro-batch. Then row row_of()[t * top_k + j] of results() is what
  // expert ids[t * top_k + j] made of t.
  absl::Status Await(int32_t micro_batch);
  Tensor results(int32_t micro_batch) const;  // [rows, hidden] act
  std::span<const int32_t> row_of(int32_t micro_batch) const {
    return flights_[static_cast<size_t>(micro_batch)].lists.row_of;
  }
  // The step failed, at whatever point: no buffer is touched any more.
  void Quit(const absl::Status& reason) { communicator_->Quit(reason); }
  // Time in waits for peers since the last call.
  std::chrono::nanoseconds TakeWaited() { return std::exchange(waited_, {}); }

 private:
  // The exchange of one micro-batch: what is under way, and its buffers.
  struct Flight {
    ExchangeShape shape;  // of this micro-batch
    ExchangeKey key;
    int32_t source = 0;
    DispatchPlan plan;
    DispatchLists lists;
    std::vector<int32_t> counts;  // [num_participants, num_experts]
    std::vector<SendOp> sends;
    std::vector<RecvOp> recvs;
    Buffer counts_message;
    std::vector<Buffer> counts_received;    // [num_attention]
    std::vector<Buffer> dispatch_messages;  // [num_experts ranks]
    Buffer combined;                        // [MaxCombineRows, hidden] act
  };

  absl::Status ExchangeCounts(Flight& flight);
  absl::Status Wait(int32_t micro_batch);

  const DType act_;
  const CellRanks ranks_;
  Communicator* const communicator_;

  DispatchPlanner planner_;
  std::array<Flight, kMaxMicroBatches> flights_;
  std::chrono::nanoseconds waited_{0};
};

}  // namespace switchyard
