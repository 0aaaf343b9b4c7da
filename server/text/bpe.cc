#include "server/text/bpe.h"

#include <algorithm>
#include <functional>
#include <queue>

#include "absl/strings/str_format.h"
#include "server/text/cat.h"
#include "server/text/json_fields.h"
#include "server/text/unicode.h"

namespace switchyard {
namespace {

constexpr char32_t kNumDirect = 0x800;

uint64_t PairKey(int32_t left, int32_t right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Bpe>> Bpe::Create(const nlohmann::json& spec) {
  if (!spec.is_object()) return absl::InvalidArgumentError("tokenizer.json has no 'model'");
  std::string type = "BPE";  // old files leave it out
  if (absl::Status s = ReadField(spec, "type", &type); !s.ok()) return s;
  if (type != "BPE")
    return absl::InvalidArgumentError(Cat("model '", type, "' is not supported, only BPE"));
  const auto& dropout = FieldOrNull(spec, "dropout");
  if (!dropout.is_null() && dropout != 0)
    return absl::InvalidArgumentError("model BPE: dropout is not supported");

  std::unique_ptr<Bpe> bpe(new Bpe());
  std::string unk;
  for (absl::Status s : {ReadField(spec, "unk_token", &unk),
                         ReadField(spec, "continuing_subword_prefix", &bpe->subword_prefix_),
                         ReadField(spec, "end_of_word_suffix", &bpe->word_suffix_),
                         ReadField(spec, "byte_fallback", &bpe->byte_fallback_),
                         ReadField(spec, "fuse_unk", &bpe->fuse_unk_),
                         ReadField(spec, "ignore_merges", &bpe->ignore_merges_)}) {
    if (!s.ok()) return s;
  }
  const auto& vocab = FieldOrNull(spec, "vocab");
  if (!vocab.is_object()) return absl::InvalidArgumentError("model BPE: 'vocab' must be an object");
  bpe->vocab_.reserve(vocab.size());
  for (const auto& [token, id] : vocab.items()) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > kMaxId) {
      return absl::InvalidArgumentError(
          Cat("model BPE: the id of '", token, "' must be an integer in [0, ", kMaxId, "]"));
    }
    bpe->vocab_[token] = static_cast<int32_t>(id.get<int64_t>());
  }
  if (!unk.empty()) {
    bpe->unk_id_ = bpe->IdOf(unk);
    if (!bpe->unk_id_)
      return absl::InvalidArgumentError(Cat("model BPE: unk_token '", unk, "' has no id"));
  }
  if (absl::Status s = bpe->ReadMerges(FieldOrNull(spec, "merges")); !s.ok()) return s;

  for (int b = 0; b < 256; ++b)
    bpe->byte_ids_[b] = bpe->IdOf(absl::StrFormat("<0x%02X>", b)).value_or(-1);
  if (bpe->subword_prefix_.empty() && bpe->word_suffix_.empty()) {
    bpe->bmp_ids_.resize(kNumDirect);
    for (char32_t c = 0; c < kNumDirect; ++c) {
      std::string text;
      unicode::AppendChar(c, &text);
      bpe->bmp_ids_[c] = bpe->IdOf(text).value_or(-1);
    }
  }
  return bpe;
}

absl::Status Bpe::ReadMerges(const nlohmann::json& list) {
  if (!list.is_array()) return absl::InvalidArgumentError("model BPE: 'merges' must be a list");
  merges_.reserve(list.size());
  int32_t rank = 0;
  for (const auto& item : list) {
    absl::Status status;
    if (item.is_array() && item.size() == 2 && item[0].is_string() && item[1].is_string()) {
      status = AddMerge(item[0].get_ref<const std::string&>(),
                        item[1].get_ref<const std::string&>(), rank);
    } else if (item.is_string()) {
      const std::string_view text = item.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
        return absl::InvalidArgumentError(
            Cat("model BPE: merge ", rank, " is not two tokens: '", text, "'"));
      }
      status = AddMerge(text.substr(0, space), text.substr(space + 1), rank);
    } else {
      return absl::InvalidArgumentError(Cat("model BPE: merge ", rank, " is not two tokens"));
    }
    if (!status.ok()) return status;
    ++rank;
  }
  return absl::OkStatus();
}

absl::Status Bpe::AddMerge(std::string_view left, std::string_view right, int32_t rank) {
  const auto left_id = IdOf(left);
  const auto right_id = IdOf(right);
  const auto id = IdOf(Cat(left, right.substr(std::min(right.size(), subword_prefix_.size()))));
  if (!left_id || !right_id || !id) {
    return absl::InvalidArgumentError(Cat("model BPE: merge ", rank, " ('", left, "', '", right,
                                          "') is not within the vocabulary"));
  }
  merges_[PairKey(*left_id, *right_id)] = Merge{rank, *id};
  return absl::OkStatus();
}

std::optional<int32_t> Bpe::IdOf(std::string_view token) const {
  const auto it = vocab_.find(token);
  if (it == vocab_.end()) return std::nullopt;
  return it->second;
}

void Bpe::Spell(std::string_view word, std::vector<Symbol>* symbols) const {
  const auto add = [&](int32_t id) { symbols->push_back({id, 0, 0, true}); };
  bool unk_pending = false;
  std::string affixed;
  size_t size = 0;
  for (size_t pos = 0; pos < word.size(); pos += size) {
    size = unicode::CharSize(static_cast<unsigned char>(word[pos]));
    std::string_view piece = word.substr(pos, size);
    int32_t id = -1;
    if (size <= 2 && !bmp_ids_.empty()) {
      id = bmp_ids_[unicode::CharAt(word, pos, &size)];
    } else {
      const bool prefix = pos > 0 && !subword_prefix_.empty();
      const bool suffix = pos + size >= word.size() && !word_suffix_.empty();
      if (prefix || suffix) {
        affixed = Cat(prefix ? subword_prefix_ : std::string(), piece,
                      suffix ? word_suffix_ : std::string());
        piece = affixed;
      }
      id = IdOf(piece).value_or(-1);
    }
    if (id >= 0) {
      if (unk_pending) add(*unk_id_);
      unk_pending = false;
      add(id);
      continue;
    }
    if (byte_fallback_) {
      bool all = true;
      for (const char c : piece) all = all && byte_ids_[static_cast<unsigned char>(c)] >= 0;
      if (all) {
        for (const char c : piece) add(byte_ids_[static_cast<unsigned char>(c)]);
        continue;
      }
    }
    if (!unk_id_) continue;
    if (unk_pending && !fuse_unk_) add(*unk_id_);
    unk_pending = true;
  }
  if (unk_pending) add(*unk_id_);
  const auto n = static_cast<int32_t>(symbols->size());
  for (int32_t i = 0; i < n; ++i) {
    (*symbols)[i].prev = i - 1;
    (*symbols)[i].next = i + 1 < n ? i + 1 : -1;
  }
}

void Bpe::MergeAll(std::vector<Symbol>* list) const {
  std::vector<Symbol>& symbols = *list;
  struct Candidate {
    int32_t rank, pos, id;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : pos > other.pos;
    }
  };
  std::vector<Candidate> storage;
  storage.reserve(symbols.size());
  const auto find = [&](int32_t left, int32_t right) -> const Merge* {
    const auto it = merges_.find(PairKey(symbols[left].id, symbols[right].id));
    return it == merges_.end() ? nullptr : &it->second;
  };
  for (int32_t i = 0; i + 1 < static_cast<int32_t>(symbols.size()); ++i) {
    if (const Merge* m = find(i, i + 1)) storage.push_back({m->rank, i, m->id});
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>(),
                                                                               std::move(storage));
  // Each merge removes a symbol and adds at most two candidates: O(n log n).
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& left = symbols[top.pos];
    if (!left.alive || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    const Merge* now = find(top.pos, left.next);
    if (now == nullptr || now->id != top.id) continue;  // a neighbour has merged since
    left.id = top.id;
    right.alive = false;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].prev = top.pos;
    if (left.prev >= 0) {
      if (const Merge* m = find(left.prev, top.pos)) queue.push({m->rank, left.prev, m->id});
    }
    if (left.next >= 0) {
      if (const Merge* m = find(top.pos, left.next)) queue.push({m->rank, top.pos, m->id});
    }
  }
}

void Bpe::EncodeUncached(std::string_view word, std::vector<int32_t>* ids) const {
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  Spell(word, &symbols);
  MergeAll(&symbols);
  for (const Symbol& symbol : symbols) {
    if (symbol.alive) ids->push_back(symbol.id);
  }
}

void Bpe::Encode(std::string_view word, std::vector<int32_t>* ids) const {
  if (ignore_merges_) {
    if (const auto id = IdOf(word)) {
      ids->push_back(*id);
      return;
    }
  }
  if (word.size() > kMaxCachedWordBytes) return EncodeUncached(word, ids);
  Shard& shard = cache_[std::hash<std::string_view>()(word) % kNumShards];
  {
    const std::lock_guard<std::mutex> lock(shard.mu);
    if (const auto it = shard.words.find(word); it != shard.words.end()) {
      ids->insert(ids->end(), it->second.begin(), it->second.end());
      return;
    }
  }
  std::vector<int32_t> fresh;
  EncodeUncached(word, &fresh);
  ids->insert(ids->end(), fresh.begin(), fresh.end());
  const std::lock_guard<std::mutex> lock(shard.mu);
  if (shard.words.size() >= kMaxWordsPerShard) shard.words.clear();
  shard.words.emplace(word, std::move(fresh));
}

}  // namespace switchyard
