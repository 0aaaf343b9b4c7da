#include "scheduler/prefix_cache.h"

#include "kernels/check.h"

namespace switchyard {

PrefixCache::PrefixCache(int32_t num_blocks)
    : sentinel_(num_blocks), held_(num_blocks), hashes_(num_blocks), links_(num_blocks + 1) {
  links_[sentinel_] = {sentinel_, sentinel_};
}

int32_t PrefixCache::Find(const BlockHash& hash) const {
  const auto it = index_.find(hash);
  return it == index_.end() ? -1 : it->second;
}

void PrefixCache::Insert(int32_t block, const BlockHash& hash) {
  if (held_[block] || !index_.emplace(hash, block).second) return;
  held_[block] = true;
  hashes_[block] = hash;
}

void PrefixCache::MarkUnused(int32_t block) {
  SY_CHECK(held_[block]);
  SY_CHECK_EQ(links_[block].next, -1);
  const int32_t newest = links_[sentinel_].previous;
  links_[block] = {newest, sentinel_};
  links_[newest].next = block;
  links_[sentinel_].previous = block;
  ++num_unused_;
}

void PrefixCache::MarkUsed(int32_t block) {
  SY_CHECK(held_[block]);
  Unlink(block);
}

void PrefixCache::Unlink(int32_t block) {
  const Link link = links_[block];
  SY_CHECK_NE(link.next, -1);
  links_[link.previous].next = link.next;
  links_[link.next].previous = link.previous;
  links_[block] = {};
  --num_unused_;
}

int32_t PrefixCache::EvictOldest() {
  SY_CHECK_GT(num_unused_, 0);
  const int32_t block = links_[sentinel_].next;
  Unlink(block);
  held_[block] = false;
  index_.erase(hashes_[block]);
  return block;
}

void PrefixCache::CheckIntegrity() const {
  int32_t num_held = 0;
  for (int32_t block = 0; block < sentinel_; ++block) {
    if (links_[block].next != -1) SY_CHECK(held_[block]);
    if (!held_[block]) continue;
    ++num_held;
    SY_CHECK_EQ(Find(hashes_[block]), block);
  }
  SY_CHECK_EQ(static_cast<int32_t>(index_.size()), num_held);
  int32_t listed = 0;
  for (int32_t b = links_[sentinel_].next; b != sentinel_; b = links_[b].next) {
    SY_CHECK_EQ(links_[links_[b].next].previous, b);
    SY_CHECK_LE(++listed, num_unused_);
  }
  SY_CHECK_EQ(listed, num_unused_);
}

}  // namespace switchyard
