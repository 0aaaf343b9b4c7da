#include "scheduler/block_manager.h"

#include <gtest/gtest.h>

#include <array>
#include <map>
#include <random>

namespace switchyard {
namespace {

using Table = std::vector<int32_t>;

BlockHash Hash(uint64_t n) { return {n, ~n}; }

// The reference implementation's own vectors (vectors_sip128): key 00…0f, input 00, 01, ….
TEST(BlockHashTest, EqualsTheReferenceVectors) {
  const BlockHashKey key{0x0706050403020100ull, 0x0f0e0d0c0b0a0908ull};
  std::array<uint8_t, 15> input;
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<uint8_t>(i);
  EXPECT_EQ(SipHash128(key, {}), (BlockHash{0xe6a825ba047f81a3ull, 0x930255c71472f66dull}));
  EXPECT_EQ(SipHash128(key, std::span(input).first(1)),
            (BlockHash{0x44af996bd8c187daull, 0x45fc229b11597634ull}));
}

TEST(BlockHashTest, CoversEverythingBefore) {
  const BlockHasher hasher({1, 2});
  const std::vector<int32_t> a = {1, 2, 3, 4}, b = {1, 2, 3, 5};
  const BlockHash root = hasher.Root("", 0);
  EXPECT_EQ(hasher.Next(root, a), hasher.Next(root, a));
  EXPECT_NE(hasher.Next(root, a), hasher.Next(root, b));
  EXPECT_NE(hasher.Next(root, a), hasher.Next(hasher.Next(root, b), a));
  EXPECT_NE(root, hasher.Root("salt", 0));
  EXPECT_NE(root, hasher.Root("", 1));
  EXPECT_NE(BlockHasher().Root("", 0), BlockHasher().Root("", 0));  // the key is drawn
}

TEST(BlockManagerTest, SharesACommittedPrefix) {
  BlockManager blocks(4);
  Table a, b;
  blocks.Acquire({}, 2, &a);
  blocks.Commit(a[0], Hash(1));
  blocks.Commit(a[1], Hash(2));
  const std::array hashes = {Hash(1), Hash(2), Hash(3)};
  const Table prefix = blocks.FindPrefix(hashes);
  EXPECT_EQ(prefix, a);
  EXPECT_FALSE(blocks.CanAcquire(prefix, 3, 0));
  EXPECT_FALSE(blocks.CanAcquire(prefix, 2, 1));
  blocks.Acquire(prefix, 2, &b);
  EXPECT_EQ(blocks.num_used(), 4);
  blocks.Release(&a);
  EXPECT_EQ(blocks.num_used(), 4);
  blocks.Release(&b);
  EXPECT_EQ(blocks.num_cached(), 2);
  EXPECT_EQ(blocks.num_free(), 2);
  blocks.CheckIntegrity(Table(4, 0));
}

TEST(BlockManagerTest, EvictsTheLeastRecentlyUsedAndTailsFirst) {
  BlockManager blocks(4);
  Table a, b;
  blocks.Acquire({}, 2, &a);
  blocks.Acquire({}, 2, &b);
  blocks.Commit(a[0], Hash(1));
  blocks.Commit(a[1], Hash(2));
  blocks.Commit(b[0], Hash(3));
  blocks.Commit(b[1], Hash(4));
  blocks.Release(&a);
  blocks.Release(&b);
  // Using a's prefix again makes b's the older.
  const std::array hashes_a = {Hash(1), Hash(2)}, hashes_b = {Hash(3), Hash(4)};
  blocks.Acquire(blocks.FindPrefix(hashes_a), 0, &a);
  blocks.Release(&a);
  Table c;
  blocks.Acquire({}, 1, &c);
  EXPECT_EQ(blocks.FindPrefix(hashes_b).size(), 1u);  // lost its tail
  EXPECT_EQ(blocks.FindPrefix(hashes_a).size(), 2u);
  blocks.Acquire({}, 1, &c);
  EXPECT_EQ(blocks.FindPrefix(hashes_b).size(), 0u);
  EXPECT_EQ(blocks.FindPrefix(hashes_a).size(), 2u);
}

TEST(BlockManagerTest, PrefixBlocksAreNotCountedTwice) {
  BlockManager blocks(2);
  Table a;
  blocks.Acquire({}, 2, &a);
  blocks.Commit(a[0], Hash(1));
  blocks.Release(&a);
  ASSERT_EQ(blocks.num_available(), 2);
  const Table prefix = blocks.FindPrefix(std::array{Hash(1)});
  EXPECT_TRUE(blocks.CanAcquire(prefix, 1, 0));
  EXPECT_FALSE(blocks.CanAcquire(prefix, 2, 0));
}

TEST(BlockManagerTest, ASecondBlockOfTheSameContentStaysPrivate) {
  BlockManager blocks(2);
  Table a, b;
  blocks.Acquire({}, 1, &a);
  blocks.Acquire({}, 1, &b);
  blocks.Commit(a[0], Hash(1));
  blocks.Commit(b[0], Hash(1));
  blocks.Release(&b);
  EXPECT_EQ(blocks.num_free(), 1);
  EXPECT_EQ(blocks.FindPrefix(std::array{Hash(1)}), a);
}

TEST(BlockManagerDeathTest, IntegrityCheckSeesALostReference) {
  BlockManager blocks(2);
  Table a;
  blocks.Acquire({}, 1, &a);
  EXPECT_DEATH(blocks.CheckIntegrity(Table(2, 0)), "refs_");
}

// Against a model: the tables that are held, and which hashes may be found.
TEST(BlockManagerTest, RandomOperationsKeepTheAccounts) {
  const uint64_t seed = 20240611;
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % n); };
  BlockManager blocks(30);
  std::vector<Table> held;
  std::map<int32_t, uint64_t> content;  // of blocks committed while they were used
  for (int32_t op = 0; op < 20000; ++op) {
    if (below(2) == 0) {
      std::vector<BlockHash> hashes;
      const int32_t family = below(3);
      for (int32_t i = below(6); i > 0; --i) hashes.push_back(Hash(family * 100 + hashes.size()));
      const Table prefix = blocks.FindPrefix(hashes);
      for (size_t i = 0; i < prefix.size(); ++i) {
        ASSERT_EQ(content.at(prefix[i]), static_cast<uint64_t>(family * 100 + i));
      }
      const int32_t num_new = below(8);
      if (!blocks.CanAcquire(prefix, num_new, 0)) continue;
      Table table;
      blocks.Acquire(prefix, num_new, &table);
      for (size_t i = prefix.size(); i < table.size(); ++i) {
        content.erase(table[i]);
        if (below(2) == 0 && i < 6) {
          blocks.Commit(table[i], Hash(family * 100 + i));
          content[table[i]] = family * 100 + i;
        }
      }
      held.push_back(table);
    } else if (!held.empty()) {
      const int32_t i = below(static_cast<int32_t>(held.size()));
      blocks.Release(&held[i]);
      held.erase(held.begin() + i);
    }
    Table refs(30, 0);
    for (const Table& table : held) {
      for (int32_t block : table) ++refs[block];
    }
    blocks.CheckIntegrity(refs);
  }
}

}  // namespace
}  // namespace switchyard
