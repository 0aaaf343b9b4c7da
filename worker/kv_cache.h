// KvCache: the paged keys and values of one attention worker, one array of blocks per layer,
// allocated once. The layout inside a block is the back end's; which block belongs to whom is the
// scheduler's. Owned by one attention worker, used on its thread only.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/model_config.h"

namespace switchyard {

constexpr int32_t kKvBlockSize = 16;  // tokens; divides the attention split of 256

class KvCache {
 public:
  KvCache(const KvCacheShape& shape, int64_t num_layers, const ComputeBackend& backend);

  const KvCacheShape& shape() const { return shape_; }
  const Tensor& layer(int64_t i) const { return views_[static_cast<size_t>(i)]; }

 private:
  const KvCacheShape shape_;
  std::vector<Buffer> storage_;
  std::vector<Tensor> views_;  // [num_blocks * KvBlockBytes] bytes each, as int32
};

// The shape of a cache of `num_blocks` blocks for this model.
KvCacheShape MakeKvCacheShape(const ModelConfig& config, DType dtype, int32_t num_blocks);
// Bytes that one block takes over all layers.
int64_t KvBytesPerBlock(const ModelConfig& config, DType dtype, const ComputeBackend& backend);

// How the memory for KV is decided at start.
struct KvBudget {
  int64_t requested_bytes =
      0;  // of the process; 0: what the sequences can use, at most half of `available_bytes`
  int64_t available_bytes = 0;
  int64_t bytes_per_block = 0;
  int32_t max_model_len = 0;
  int32_t max_num_seqs = 0;
  int32_t num_workers = 1;
};
// Blocks per attention worker: at least one sequence of max_model_len must fit, or the error gives
// the sum.
absl::StatusOr<int32_t> PlanKvBlocks(const KvBudget& budget);

// What this process may still allocate: MemAvailable, or what the cgroup leaves when that is less.
int64_t AvailableMemoryBytes();

}  // namespace switchyard
