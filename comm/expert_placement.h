// ExpertPlacement: the immutable map between logical experts and the physical replicas on expert
// ranks. Part of an epoch; shared as shared_ptr<const ExpertPlacement>.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace switchyard {

class ExpertPlacement {
 public:
  // hosts[layer][expert] = expert ranks (dense, 0-based among expert ranks, ascending) that hold a
  // replica.
  static absl::StatusOr<ExpertPlacement> Create(
      int32_t num_ranks, std::vector<std::vector<std::vector<int32_t>>> hosts);
  // Contiguous even split without replicas; num_experts need not be a multiple of num_ranks.
  static ExpertPlacement Even(int32_t num_layers, int32_t num_experts, int32_t num_ranks);

  int32_t num_layers() const;
  int32_t num_experts() const;
  int32_t num_ranks() const;
  std::span<const int32_t> Hosts(int32_t layer, int32_t expert) const;
  // The experts that `rank` holds in `layer`, ascending.
  std::vector<int32_t> ExpertsOf(int32_t layer, int32_t rank) const;

  // Every expert has a host, hosts are in range, ascending, and no rank holds two replicas of one
  // expert.
  absl::Status Validate() const;

 private:
  int32_t num_ranks_ = 0;
  std::vector<std::vector<std::vector<int32_t>>> hosts_;
};

}  // namespace switchyard
