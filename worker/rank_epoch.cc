#include "worker/rank_epoch.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"

namespace switchyard {
namespace {

constexpr int kMaxMembers = 1024;

absl::Status Bad(const v1::Install& install, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("epoch ", install.epoch(), ": ", what));
}

// What was not measured is 0 and keeps its default.
absl::StatusOr<PlanCosts> FromWire(const v1::PlanCosts& from) {
  PlanCosts costs;
  if (from.token_ps() != 0) costs.token_ps = from.token_ps();
  if (from.expert_read_ps() != 0) costs.expert_read_ps = from.expert_read_ps();
  if (from.expert_move_ps() != 0) costs.expert_move_ps = from.expert_move_ps();
  if (absl::Status status = CheckPlanCosts(costs); !status.ok()) return status;
  return costs;
}

}  // namespace

absl::StatusOr<RankEpoch> ParseInstall(const v1::Install& install, const ModelInfo& model,
                                       v1::WorkerRole role, int32_t foreign_slots) {
  const int members = install.members_size();
  if (members > kMaxMembers || install.num_attention() < 1 || install.num_attention() >= members) {
    return Bad(install, absl::StrCat(install.num_attention(), " attention workers of ", members,
                                     " members (at most ", kMaxMembers, ")"));
  }
  const bool attention = role == v1::WORKER_ROLE_ATTENTION;
  const int first = attention ? 0 : install.num_attention();
  const int end = attention ? install.num_attention() : members;
  if (install.rank() < first || install.rank() >= end) {
    return Bad(install, absl::StrCat("rank ", install.rank(), " is not of this role: those are ",
                                     first, " to ", end - 1));
  }
  RankEpoch spec;
  spec.ranks = {.num_attention = install.num_attention(),
                .num_experts = members - install.num_attention()};
  spec.group.epoch = install.epoch();
  spec.group.rank = install.rank();
  for (const v1::Member& member : install.members())
    spec.group.members.push_back({.address = member.data_address()});
  spec.group.secret = install.secret();

  const int64_t lists = int64_t{model.num_moe_layers} * model.num_experts;
  if (install.hosts_size() != lists) {
    return Bad(install, absl::StrCat(install.hosts_size(), " host lists for ", model.num_moe_layers,
                                     " MoE layers of ", model.num_experts, " experts"));
  }
  std::vector<std::vector<std::vector<int32_t>>> hosts(static_cast<size_t>(model.num_moe_layers));
  for (int i = 0; i < install.hosts_size(); ++i) {
    const auto& ranks = install.hosts(i).ranks();
    hosts[static_cast<size_t>(i / model.num_experts)].emplace_back(ranks.begin(), ranks.end());
  }
  absl::StatusOr<ExpertPlacement> placement =
      ExpertPlacement::Create(spec.ranks.num_experts, std::move(hosts));
  if (!placement.ok()) return Bad(install, std::string(placement.status().message()));
  spec.placement = std::make_shared<ExpertPlacement>(*std::move(placement));

  const std::optional<BalanceMode> mode = ParseBalanceMode(install.balance());
  if (!mode) return Bad(install, absl::StrCat("balance \"", install.balance(), "\""));
  spec.planner.mode = *mode;
  spec.planner.foreign_slots_per_rank = foreign_slots;
  if (install.has_costs()) {
    absl::StatusOr<PlanCosts> costs = FromWire(install.costs());
    if (!costs.ok()) return Bad(install, std::string(costs.status().message()));
    spec.planner.costs = *costs;
  }
  return spec;
}

absl::StatusOr<std::vector<std::vector<int32_t>>> ParseAssign(const v1::Assign& assign,
                                                              const ModelInfo& model) {
  if (assign.layers_size() != model.num_moe_layers) {
    return absl::InvalidArgumentError(absl::StrCat("assignment ", assign.assignment(), " has ",
                                                   assign.layers_size(), " layers, not ",
                                                   model.num_moe_layers));
  }
  std::vector<std::vector<int32_t>> layers;
  for (const v1::ExpertList& list : assign.layers()) {
    std::vector<int32_t>& experts = layers.emplace_back();
    for (int32_t expert : list.experts()) {
      if (expert < 0 || expert >= model.num_experts ||
          (!experts.empty() && expert <= experts.back())) {
        return absl::InvalidArgumentError(
            absl::StrCat("assignment ", assign.assignment(), ", MoE layer ", layers.size() - 1,
                         ": expert ", expert, " of ", model.num_experts, ", or not ascending"));
      }
      experts.push_back(expert);
    }
  }
  return layers;
}

}  // namespace switchyard
