// PrefixCache: which KV block holds which prefix, and in which order the unreferenced ones are
// given away (least recently used first). Owned by a BlockManager, on the scheduler's thread. It
// keeps no reference counts: the BlockManager says when a block is used or unused.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "scheduler/block_hash.h"

namespace switchyard {

class PrefixCache {
 public:
  explicit PrefixCache(int32_t num_blocks);

  int32_t Find(const BlockHash& hash) const;  // the block, or -1
  bool Holds(int32_t block) const { return held_[block]; }
  // The block, which is used, now holds `hash`. Does nothing when another block holds it or this
  // one holds a prefix.
  void Insert(int32_t block, const BlockHash& hash);

  // REQUIRES: Holds(block). Unused blocks queue for eviction in the order of these calls.
  void MarkUnused(int32_t block);
  void MarkUsed(int32_t block);
  // Forgets the least recently used unused block and returns it. REQUIRES: num_unused() > 0.
  int32_t EvictOldest();

  int32_t num_unused() const { return num_unused_; }
  // Walks list and index. CHECKs that they agree with each other.
  void CheckIntegrity() const;

 private:
  struct LowWord {
    size_t operator()(const BlockHash& hash) const { return hash.low; }
  };
  struct Link {
    int32_t previous = -1;  // -1: not in the list
    int32_t next = -1;
  };
  void Unlink(int32_t block);

  const int32_t sentinel_;  // = num_blocks: the list's head and tail
  std::unordered_map<BlockHash, int32_t, LowWord> index_;
  std::vector<bool> held_;         // [num_blocks]
  std::vector<BlockHash> hashes_;  // [num_blocks], meaningful where held
  std::vector<Link> links_;        // [num_blocks + 1], circular: sentinel, oldest … newest
  int32_t num_unused_ = 0;
};

}  // namespace switchyard
