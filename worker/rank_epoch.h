// RankEpoch: an epoch as one of its ranks sees it, as an Install message brings it, checked against
// the model. A plain value.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/data_plane.h"
#include "comm/dispatch_planner.h"
#include "comm/expert_placement.h"
#include "proto/model_info.h"
#include "switchyard/v1/control.pb.h"
#include "worker/moe_exchange.h"

namespace switchyard {

struct RankEpoch {
  GroupSpec group;
  CellRanks ranks;
  std::shared_ptr<const ExpertPlacement> placement;
  PlannerOptions planner;
};

// kInvalidArgument, with the numbers, when the message does not fit the model or the role.
// `foreign_slots`: as the scheduler's welcome said.
absl::StatusOr<RankEpoch> ParseInstall(const v1::Install& install, const ModelInfo& model,
                                       v1::WorkerRole role, int32_t foreign_slots);
// The lists of an Assign: one per MoE layer, experts of the model, ascending.
absl::StatusOr<std::vector<std::vector<int32_t>>> ParseAssign(const v1::Assign& assign,
                                                              const ModelInfo& model);

}  // namespace switchyard
