#include "comm/expert_placement.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {

absl::StatusOr<ExpertPlacement> ExpertPlacement::Create(
    int32_t num_ranks, std::vector<std::vector<std::vector<int32_t>>> hosts) {
  ExpertPlacement placement;
  placement.num_ranks_ = num_ranks;
  placement.hosts_ = std::move(hosts);
  if (absl::Status status = placement.Validate(); !status.ok()) return status;
  return placement;
}

ExpertPlacement ExpertPlacement::Even(int32_t num_layers, int32_t num_experts, int32_t num_ranks) {
  SY_CHECK_GE(num_layers, 0);
  SY_CHECK_GE(num_experts, 0);
  SY_CHECK_GT(num_ranks, 0);
  std::vector<std::vector<int32_t>> layer(static_cast<size_t>(num_experts));
  for (int64_t e = 0; e < num_experts; ++e) {
    // Rank r holds the experts [r * N / P, (r + 1) * N / P): sizes differ by at most one.
    layer[static_cast<size_t>(e)] = {static_cast<int32_t>(((e + 1) * num_ranks - 1) / num_experts)};
  }
  ExpertPlacement placement;
  placement.num_ranks_ = num_ranks;
  placement.hosts_.assign(static_cast<size_t>(num_layers), layer);
  return placement;
}

int32_t ExpertPlacement::num_layers() const { return static_cast<int32_t>(hosts_.size()); }
int32_t ExpertPlacement::num_experts() const {
  return hosts_.empty() ? 0 : static_cast<int32_t>(hosts_[0].size());
}
int32_t ExpertPlacement::num_ranks() const { return num_ranks_; }

std::span<const int32_t> ExpertPlacement::Hosts(int32_t layer, int32_t expert) const {
  SY_CHECK(layer >= 0 && layer < num_layers());
  SY_CHECK(expert >= 0 && expert < num_experts());
  return hosts_[static_cast<size_t>(layer)][static_cast<size_t>(expert)];
}

std::vector<int32_t> ExpertPlacement::ExpertsOf(int32_t layer, int32_t rank) const {
  std::vector<int32_t> experts;
  for (int32_t e = 0; e < num_experts(); ++e) {
    if (std::ranges::binary_search(Hosts(layer, e), rank)) experts.push_back(e);
  }
  return experts;
}

absl::Status ExpertPlacement::Validate() const {
  if (num_ranks_ <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("placement over ", num_ranks_, " expert ranks"));
  }
  for (size_t layer = 0; layer < hosts_.size(); ++layer) {
    if (hosts_[layer].size() != hosts_[0].size()) {
      return absl::InvalidArgumentError(absl::StrCat("placement: layer ", layer, " has ",
                                                     hosts_[layer].size(), " experts, layer 0 has ",
                                                     hosts_[0].size()));
    }
    for (size_t expert = 0; expert < hosts_[layer].size(); ++expert) {
      const std::vector<int32_t>& hosts = hosts_[layer][expert];
      if (hosts.empty()) {
        return absl::InvalidArgumentError(
            absl::StrCat("placement: expert ", expert, " of layer ", layer, " has no host"));
      }
      for (size_t i = 0; i < hosts.size(); ++i) {
        if (hosts[i] < 0 || hosts[i] >= num_ranks_) {
          return absl::InvalidArgumentError(absl::StrCat("placement: expert ", expert, " of layer ",
                                                         layer, " on rank ", hosts[i], " of ",
                                                         num_ranks_));
        }
        if (i > 0 && hosts[i] <= hosts[i - 1]) {
          return absl::InvalidArgumentError(
              absl::StrCat("placement: hosts of expert ", expert, " of layer ", layer,
                           " are not ascending: rank ", hosts[i], " after ", hosts[i - 1]));
        }
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace switchyard
