// BlockHash: the name of a KV block's content in the prefix cache. A chain: the hash of a block
// covers everything that changes its hidden states, that is cache salt, routing profile, and all
// token ids up to the block's end.
//
// 128 bits of SipHash-2-4 under a key drawn at start: nobody who sends prompts can construct two
// that collide, and chance collisions are out of reach (2^64 blocks), so the cache compares hashes
// alone. Pure values; any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace switchyard {

struct BlockHash {
  uint64_t low = 0;
  uint64_t high = 0;
  bool operator==(const BlockHash&) const = default;
};

struct BlockHashKey {
  uint64_t k0 = 0;
  uint64_t k1 = 0;
};

// SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, https://github.com/veorq/SipHash).
BlockHash SipHash128(const BlockHashKey& key, std::span<const uint8_t> bytes);

class BlockHasher {
 public:
  BlockHasher();  // draws the key
  explicit BlockHasher(const BlockHashKey& key) : key_(key) {}

  // The predecessor of a sequence's first block.
  BlockHash Root(std::string_view cache_salt, uint32_t routing_profile) const;
  // The block after `previous` that holds `tokens`  // [block_size]
  BlockHash Next(const BlockHash& previous, std::span<const int32_t> tokens) const;

 private:
  BlockHashKey key_;  // constant after construction
};

}  // namespace switchyard
