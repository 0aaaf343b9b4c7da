#include "scheduler/block_manager.h"

#include <numeric>

#include "kernels/check.h"

namespace switchyard {

BlockManager::BlockManager(int32_t num_blocks)
    : refs_(num_blocks), free_(num_blocks), cache_(num_blocks) {
  std::iota(free_.rbegin(), free_.rend(), 0);  // block 0 on top
}

std::vector<int32_t> BlockManager::FindPrefix(std::span<const BlockHash> hashes) const {
  std::vector<int32_t> prefix;
  for (const BlockHash& hash : hashes) {
    const int32_t block = cache_.Find(hash);
    if (block < 0) break;
    prefix.push_back(block);
  }
  return prefix;
}

void BlockManager::Reference(int32_t block) {
  if (refs_[block]++ > 0) return;
  ++num_used_;
  if (cache_.Holds(block)) cache_.MarkUsed(block);
}

bool BlockManager::CanAcquire(std::span<const int32_t> prefix, int32_t num_new,
                              int32_t reserve) const {
  SY_CHECK_GE(num_new, 0);
  int32_t available = num_available();
  for (int32_t block : prefix) available -= refs_[block] == 0;
  return available >= num_new + reserve;
}

void BlockManager::Acquire(std::span<const int32_t> prefix, int32_t num_new,
                           std::vector<int32_t>* table) {
  SY_CHECK(CanAcquire(prefix, num_new, 0));
  for (int32_t block : prefix) {
    SY_CHECK(cache_.Holds(block));
    Reference(block);
    table->push_back(block);
  }
  for (int32_t i = 0; i < num_new; ++i) {
    if (free_.empty()) free_.push_back(cache_.EvictOldest());
    const int32_t block = free_.back();
    free_.pop_back();
    SY_CHECK_EQ(refs_[block], 0);
    Reference(block);
    table->push_back(block);
  }
}

void BlockManager::Release(std::vector<int32_t>* table) {
  for (; !table->empty(); table->pop_back()) {
    const int32_t block = table->back();
    SY_CHECK_GT(refs_[block], 0);
    if (--refs_[block] > 0) continue;
    --num_used_;
    if (cache_.Holds(block)) {
      cache_.MarkUnused(block);
    } else {
      free_.push_back(block);
    }
  }
}

void BlockManager::Commit(int32_t block, const BlockHash& hash) {
  SY_CHECK_GT(refs_[block], 0);
  cache_.Insert(block, hash);
}

void BlockManager::CheckIntegrity(std::span<const int32_t> expected_refs) const {
  SY_CHECK_EQ(expected_refs.size(), refs_.size());
  int32_t used = 0;
  for (int32_t block = 0; block < num_blocks(); ++block) {
    SY_CHECK_EQ(refs_[block], expected_refs[block]);
    used += refs_[block] > 0;
  }
  SY_CHECK_EQ(used, num_used_);
  SY_CHECK_EQ(num_free() + num_cached() + num_used(), num_blocks());
  std::vector<bool> seen(refs_.size());
  for (int32_t block : free_) {
    SY_CHECK_EQ(refs_[block], 0);
    SY_CHECK(!cache_.Holds(block));
    SY_CHECK(!seen[block]);
    seen[block] = true;
  }
  cache_.CheckIntegrity();
}

}  // namespace switchyard
