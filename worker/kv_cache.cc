#include "worker/kv_cache.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace switchyard {
namespace {

std::string Gib(int64_t bytes) {
  return absl::StrFormat("%.3f GiB", static_cast<double>(bytes) / (1 << 30));
}

// A cgroup file that holds one number; -1 when there is none ("max", other versions, no such file).
int64_t ReadNumber(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  int64_t value = 0;
  return (file >> text) && absl::SimpleAtoi(text, &value) ? value : -1;
}

}  // namespace

KvCache::KvCache(const KvCacheShape& shape, int64_t num_layers, const ComputeBackend& backend)
    : shape_(shape) {
  const size_t bytes = backend.KvBlockBytes(shape) * static_cast<size_t>(shape.num_blocks);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    storage_.emplace_back(bytes);
    views_.push_back(storage_.back().View(DType::kI32, {static_cast<int64_t>(bytes / 4)}));
  }
}

KvCacheShape MakeKvCacheShape(const ModelConfig& config, DType dtype, int32_t num_blocks) {
  return {.num_blocks = num_blocks,
          .block_size = kKvBlockSize,
          .num_kv_heads = static_cast<int>(config.attention.num_kv_heads),
          .head_dim = static_cast<int>(config.attention.head_dim),
          .dtype = dtype};
}

int64_t KvBytesPerBlock(const ModelConfig& config, DType dtype, const ComputeBackend& backend) {
  return static_cast<int64_t>(backend.KvBlockBytes(MakeKvCacheShape(config, dtype, 1))) *
         config.num_layers;
}

absl::StatusOr<int32_t> PlanKvBlocks(const KvBudget& budget) {
  if (budget.requested_bytes > budget.available_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "KV cache: ", budget.requested_bytes, " bytes (", Gib(budget.requested_bytes),
        ") were asked for, but weights and buffers leave ",
        std::max<int64_t>(0, budget.available_bytes), " bytes (",
        Gib(std::max<int64_t>(0, budget.available_bytes)), ") of the available memory"));
  }
  const int64_t blocks_per_sequence = (budget.max_model_len + kKvBlockSize - 1) / kKvBlockSize;
  const int64_t useful = blocks_per_sequence * budget.max_num_seqs;  // more would never be used
  const int64_t bytes =
      budget.requested_bytes > 0 ? budget.requested_bytes : budget.available_bytes / 2;
  const int64_t affordable = bytes / budget.num_workers / budget.bytes_per_block;
  const int64_t blocks = budget.requested_bytes > 0 ? affordable : std::min(affordable, useful);
  if (blocks < blocks_per_sequence) {
    const int64_t needed = blocks_per_sequence * budget.bytes_per_block * budget.num_workers;
    return absl::ResourceExhaustedError(absl::StrCat(
        "KV cache: one sequence of ", budget.max_model_len, " tokens needs ", blocks_per_sequence,
        " blocks of ", budget.bytes_per_block, " bytes in each of ", budget.num_workers,
        " attention workers = ", needed, " bytes (", Gib(needed), "), but there are ", bytes,
        " bytes (", Gib(bytes),
        budget.requested_bytes > 0 ? ", as asked for" : ", half of the available memory",
        "): raise --kv-cache-memory or lower --max-model-len"));
  }
  return static_cast<int32_t>(
      std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max() / kKvBlockSize));
}

int64_t AvailableMemoryBytes() {
  int64_t available = 0;
  std::ifstream meminfo("/proc/meminfo");
  std::string name;
  int64_t kib = 0;
  std::string unit;
  while (meminfo >> name >> kib) {
    if (name == "MemAvailable:") available = kib * 1024;
    std::getline(meminfo, unit);
  }
  const int64_t limit = ReadNumber("/sys/fs/cgroup/memory.max");
  const int64_t used = ReadNumber("/sys/fs/cgroup/memory.current");
  if (limit > 0 && used >= 0) {
    // The page cache counts as used but is given back when memory is short.
    int64_t reclaimable = 0;
    std::ifstream stat("/sys/fs/cgroup/memory.stat");
    for (int64_t bytes = 0; stat >> name >> bytes;)
      if (name == "inactive_file") reclaimable = bytes;
    available = std::min(available, std::max<int64_t>(0, limit - used + reclaimable));
  }
  return available;
}

}  // namespace switchyard
