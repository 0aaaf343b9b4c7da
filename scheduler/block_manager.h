// BlockManager: KV accounting of one attention worker, by block ids alone; the blocks themselves
// lie in the worker. Owned by the SchedulerCore, on its thread. Every block is in exactly one
// state:
//
//   free ──Acquire──▶ used (refs ≥ 1) ──Release, not in the prefix cache──▶ free
//                        │   ▲
//     Release, in the    ▼   │ Acquire as a prefix
//     prefix cache     cached (refs = 0) ──evicted by Acquire──▶ used
//
// A block enters the prefix cache by Commit, when its content is known to be written. From then on
// nobody writes it: it may stand in many block tables. It never gives a block away that somebody
// references.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "scheduler/block_hash.h"
#include "scheduler/prefix_cache.h"

namespace switchyard {

class BlockManager {
 public:
  explicit BlockManager(int32_t num_blocks);

  // The longest cached prefix: the blocks that hold hashes[0], hashes[1], … up to the first miss.
  std::vector<int32_t> FindPrefix(std::span<const BlockHash> hashes) const;

  // Whether `reserve` blocks would stay available after Acquire(prefix, num_new).
  bool CanAcquire(std::span<const int32_t> prefix, int32_t num_new, int32_t reserve) const;
  // References `prefix` (from FindPrefix) and takes `num_new` blocks more, appending all to
  // `table`. REQUIRES: CanAcquire(prefix, num_new, 0).
  void Acquire(std::span<const int32_t> prefix, int32_t num_new, std::vector<int32_t>* table);
  // Drops one reference of every block of the table and empties it. Tails become the first to
  // evict.
  void Release(std::vector<int32_t>* table);
  // `block`, which is used, is completely written and holds `hash`. A second block of the same
  // content stays private.
  void Commit(int32_t block, const BlockHash& hash);

  int32_t num_blocks() const { return static_cast<int32_t>(refs_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_cached() const { return cache_.num_unused(); }  // unreferenced, can be evicted
  int32_t num_used() const { return num_used_; }
  int32_t num_available() const { return num_free() + num_cached(); }

  // CHECKs that free + cached + used = total, and that each block's references equal
  // `expected_refs`  // [num_blocks]
  void CheckIntegrity(std::span<const int32_t> expected_refs) const;

 private:
  void Reference(int32_t block);

  std::vector<int32_t> refs_;  // [num_blocks]
  std::vector<int32_t> free_;  // a stack
  PrefixCache cache_;
  int32_t num_used_ = 0;
};

}  // namespace switchyard
