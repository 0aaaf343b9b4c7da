// ForeignExperts: the foreign slots of one expert rank: room for experts whose home is elsewhere,
// and the messages that bring their packed weights (BALANCE.md regime C). All buffers are allocated
// at construction. What a slot holds is the planner's business; this class only moves bytes. Owned
// by one ExpertRank, used on its thread only; backend and communicator must outlive it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/exchange_layout.h"
#include "kernels/backend.h"
#include "worker/moe_exchange.h"
#include "worker/weights.h"

namespace switchyard {

struct ForeignExpertsShape {
  int32_t expert_rank = 0;
  CellRanks ranks;
  int32_t num_moe_layers = 0;
  int32_t slots = 0;  // per layer, at most kMaxForeignSlots
  int64_t width = 0;  // of every expert: a model has one for all of them
  int64_t hidden = 0;
  std::vector<WeightFormat> formats;  // [num_moe_layers]; empty without slots
};

class ForeignExperts {
 public:
  ForeignExperts(const ForeignExpertsShape& shape, std::shared_ptr<const ExpertWeights> homes,
                 ComputeBackend* backend, Communicator* communicator);

  // Starts this rank's sends and receives of plan.moves, in the group of the key's micro-batch;
  // true when there are any, and then Finish must follow before anything else is started in that
  // group. key and plan must live until then. A moved
  // expert's slot is not to be read before.
  absl::StatusOr<bool> Start(const ExchangeKey& key, const DispatchPlan& plan);
  absl::Status Finish();

  const MlpWeights& Slot(int32_t layer, int32_t slot) const {
    return slots_[static_cast<size_t>(layer)][static_cast<size_t>(slot)];
  }

 private:
  // Constant after construction.
  const ForeignExpertsShape shape_;
  const std::shared_ptr<const ExpertWeights> homes_;
  Communicator* const communicator_;

  std::vector<std::vector<MlpWeights>> slots_;  // [num_moe_layers][slots]
  // Of the moves under way.
  const ExchangeKey* key_ = nullptr;
  const DispatchPlan* plan_ = nullptr;
  std::vector<ExchangeHeader> headers_;   // one per move of this rank, sent or received
  std::vector<const WeightMove*> moves_;  // the received ones, in the order of recvs_
  std::vector<SendOp> sends_;
  std::vector<RecvOp> recvs_;  // three per received move: header, gate and up, down
};

}  // namespace switchyard
