// Byte-pair encoding: the `model` of tokenizer.json. Turns one word into ids by merging neighbours,
// lowest rank first.
//
// Owner: the Tokenizer. Immutable after Create except for the cache of words, which locks itself;
// any thread. A word of n characters takes O(n log n); must never be quadratic, a word may be a
// megabyte long.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "server/text/cat.h"

namespace switchyard {

class Bpe {
 public:
  static constexpr int64_t kMaxId = (1 << 24) - 1;

  // Types other than BPE, dropout, and merges whose parts or result are not in the vocabulary are
  // refused.
  static absl::StatusOr<std::unique_ptr<Bpe>> Create(const nlohmann::json& spec);

  // Appends the ids of `word`. Characters that the vocabulary cannot spell become unk_token, or
  // nothing without one.
  void Encode(std::string_view word, std::vector<int32_t>* ids) const;

  std::optional<int32_t> IdOf(std::string_view token) const;
  // Calls f(token, id) for all of the vocabulary, in no order.
  template <typename F>
  void ForEach(F&& f) const {
    for (const auto& [token, id] : vocab_) f(token, id);
  }

 private:
  struct Merge {
    int32_t rank;
    int32_t id;
  };
  // A character or what it merged into; a doubly linked list over the positions of the word.
  struct Symbol {
    int32_t id;
    int32_t prev, next;  // -1: none
    bool alive;
  };
  struct Shard {
    std::mutex mu;
    absl::flat_hash_map<std::string, std::vector<int32_t>, ViewHash, ViewEq>
        words;  // guarded by mu
  };
  static constexpr size_t kNumShards = 16;
  static constexpr size_t kMaxWordsPerShard = 4096;
  static constexpr size_t kMaxCachedWordBytes = 48;

  Bpe() = default;
  absl::Status ReadMerges(const nlohmann::json& list);
  absl::Status AddMerge(std::string_view left, std::string_view right, int32_t rank);
  void Spell(std::string_view word, std::vector<Symbol>* symbols) const;
  void MergeAll(std::vector<Symbol>* symbols) const;
  void EncodeUncached(std::string_view word, std::vector<int32_t>* ids) const;

  // Constant after construction.
  absl::flat_hash_map<std::string, int32_t, ViewHash, ViewEq> vocab_;
  absl::flat_hash_map<uint64_t, Merge> merges_;  // (left id << 32 | right id)
  std::vector<int32_t> bmp_ids_;  // id of single characters < 0x800, -1: none; empty with an affix
  std::array<int32_t, 256> byte_ids_;  // "<0x00>" …, -1: none
  std::optional<int32_t> unk_id_;
  std::string subword_prefix_, word_suffix_;
  bool byte_fallback_ = false, fuse_unk_ = false, ignore_merges_ = false;

  mutable std::array<Shard, kNumShards> cache_;
};

}  // namespace switchyard
