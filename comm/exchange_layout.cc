#include "comm/exchange_layout.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

static_assert(std::endian::native == std::endian::little,
              "messages are little-endian and copied as they are");
static_assert(std::is_trivially_copyable_v<ExchangeHeader> && sizeof(ExchangeHeader) == 88);

constexpr uint32_t kMagic = 0x45585953;  // "SYXE"
constexpr uint16_t kVersion = 2;

uint64_t ParticipantsHash(const StepHeader& step) {
  uint64_t hash = 0xcbf29ce484222325u ^ step.micro_batches;  // FNV-1a over words
  for (int32_t rank : step.participants)
    hash = (hash * 0x100000001b3u) ^ static_cast<uint32_t>(rank);
  return hash * 0x100000001b3u;
}

ExchangeHeader MakeHeader(const ExchangeKey& key, ExchangeKind kind, int32_t source) {
  ExchangeHeader header;
  header.magic = kMagic;
  header.version = kVersion;
  header.kind = static_cast<uint16_t>(kind);
  header.epoch = key.step->epoch;
  header.step = key.step->step;
  header.slots_generation = key.step->slots_generation;
  header.participants_hash = ParticipantsHash(*key.step);
  header.layer = key.layer;
  header.micro_batch = key.micro_batch;
  header.source = source;
  header.expert_rank = -1;
  header.num_participants = static_cast<int32_t>(key.step->participants.size());
  return header;
}

const char* KindName(ExchangeKind kind) {
  return kind == ExchangeKind::kCounts     ? "count"
         : kind == ExchangeKind::kDispatch ? "dispatch"
         : kind == ExchangeKind::kCombine  ? "combine"
                                           : "weights";
}

size_t PaddedHeader(int32_t row_bytes) {
  return static_cast<size_t>(HeaderRows(row_bytes)) * static_cast<size_t>(row_bytes);
}

// What a message is expected to be; the checks below name the first number that differs.
class HeaderCheck {
 public:
  HeaderCheck(std::span<const std::byte> message, const ExchangeKey& key, ExchangeKind kind,
              int32_t source)
      : kind_(kind), source_(source) {
    if (message.size() < sizeof(header_)) {
      Fail("bytes", static_cast<int64_t>(message.size()), "at least", sizeof(header_));
      return;
    }
    std::memcpy(&header_, message.data(), sizeof(header_));
    const ExchangeHeader want = MakeHeader(key, kind, source);
    Expect("magic", header_.magic, want.magic);
    Expect("version", header_.version, want.version);
    Expect("kind", header_.kind, want.kind);
    Expect("epoch", header_.epoch, want.epoch);
    Expect("step", header_.step, want.step);
    Expect("layer", header_.layer, want.layer);
    Expect("micro_batch", header_.micro_batch, want.micro_batch);
    Expect("slots_generation", header_.slots_generation, want.slots_generation);
    Expect("num_participants", header_.num_participants, want.num_participants);
    Expect("participants_hash", header_.participants_hash, want.participants_hash);
    Expect("source", header_.source, want.source);
  }

  template <typename T, typename U>
  void Expect(const char* what, T got, U want) {
    if (status_.ok() && !std::cmp_equal(got, want)) Fail(what, got, "expected", want);
  }
  void ExpectRange(const char* what, int64_t got, int64_t max) {
    if (status_.ok() && (got < 0 || got > max)) Fail(what, got, "at most", max);
  }

  const ExchangeHeader& header() const { return header_; }
  const absl::Status& status() const { return status_; }

 private:
  template <typename T, typename U>
  void Fail(const char* what, T got, const char* relation, U want) {
    status_ =
        absl::InvalidArgumentError(absl::StrCat(KindName(kind_), " message of source ", source_,
                                                ": ", what, " ", got, ", ", relation, " ", want));
  }

  const ExchangeKind kind_;
  const int32_t source_;
  ExchangeHeader header_;
  absl::Status status_;
};

int64_t CopiesFor(const DispatchPlan& plan, int32_t source, int32_t expert, int32_t rank) {
  for (const DispatchShare share : plan.Of(source, expert)) {
    if (share.rank == rank) return share.copies;
  }
  return 0;
}

int64_t CopiesFor(const DispatchPlan& plan, int32_t source, int32_t rank) {
  int64_t copies = 0;
  for (int32_t e = 0; e < plan.num_experts; ++e) copies += CopiesFor(plan, source, e, rank);
  return copies;
}

int32_t LoadIndex(const std::byte* copies, int64_t i) {
  int32_t row;
  std::memcpy(&row, copies + i * static_cast<int64_t>(sizeof(row)), sizeof(row));
  return row;
}

}  // namespace

int32_t HeaderRows(int32_t row_bytes) {
  SY_CHECK_GT(row_bytes, 0);
  return (static_cast<int32_t>(sizeof(ExchangeHeader)) + row_bytes - 1) / row_bytes;
}

size_t MaxCountsBytes(const ExchangeShape& shape) {
  return sizeof(ExchangeHeader) + static_cast<size_t>(shape.num_experts) * sizeof(int32_t);
}

size_t MaxDispatchBytes(const ExchangeShape& shape) {
  const auto rows = static_cast<size_t>(shape.max_rows);
  return PaddedHeader(shape.row_bytes) + rows * static_cast<size_t>(shape.row_bytes) +
         (rows * static_cast<size_t>(shape.top_k) + static_cast<size_t>(shape.num_experts)) *
             sizeof(int32_t);
}

int64_t MaxCombineRows(const ExchangeShape& shape, int32_t num_expert_ranks) {
  return static_cast<int64_t>(HeaderRows(shape.row_bytes)) * num_expert_ranks +
         static_cast<int64_t>(shape.max_rows) * shape.top_k;
}

void CountExperts(std::span<const int32_t> ids, std::span<int32_t> counts) {
  std::ranges::fill(counts, 0);
  for (int32_t id : ids) {
    if (id < 0) continue;
    SY_CHECK_LT(static_cast<size_t>(id), counts.size());
    ++counts[static_cast<size_t>(id)];
  }
}

void BuildDispatchLists(std::span<const int32_t> ids, int32_t top_k, const DispatchPlan& plan,
                        int32_t source, int32_t row_bytes, DispatchLists* lists) {
  SY_CHECK(source >= 0 && source < plan.num_sources);
  SY_CHECK_GT(top_k, 0);
  SY_CHECK_EQ(ids.size() % static_cast<size_t>(top_k), 0u);
  const auto num_experts = static_cast<size_t>(plan.num_experts);
  const auto num_ranks = static_cast<size_t>(plan.num_ranks);
  lists->ranks.resize(num_ranks);
  lists->share_of.assign(num_experts, 0);
  lists->taken.assign(num_experts, 0);
  lists->first.clear();

  // Where each share's copies stand in its rank's message: experts ascending. combine_row counts
  // copies for now.
  for (DispatchLists::Rank& rank : lists->ranks) {
    rank.tokens.clear();
    rank.combine_row = 0;
  }
  lists->shares.clear();
  for (size_t e = 0; e < num_experts; ++e) {
    lists->share_of[e] = static_cast<int32_t>(lists->shares.size());
    for (const DispatchShare share : plan.Of(source, static_cast<int32_t>(e))) {
      int64_t& copies = lists->ranks[static_cast<size_t>(share.rank)].combine_row;
      lists->first.push_back(copies);
      lists->shares.push_back(share);
      copies += share.copies;
    }
  }
  int64_t next_row = 0;
  for (DispatchLists::Rank& rank : lists->ranks) {
    const int64_t copies = rank.combine_row;
    rank.copy_row.resize(static_cast<size_t>(copies));
    rank.combine_row = next_row;
    next_row += HeaderRows(row_bytes) + copies;
  }
  SY_CHECK_LE(next_row, INT32_MAX);
  lists->combine_rows = next_row;

  lists->row_of.resize(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0) {
      lists->row_of[i] = -1;
      continue;
    }
    const auto e = static_cast<size_t>(ids[i]);
    SY_CHECK_LT(e, num_experts);
    int32_t& taken = lists->taken[e];
    SY_CHECK_LT(taken, plan.CopiesOf(source, ids[i]));
    ++taken;
    // Copies are taken from the expert's shares in turn; a share used up counts down to 0.
    int32_t& at = lists->share_of[e];
    if (lists->shares[static_cast<size_t>(at)].copies == 0) ++at;
    DispatchShare& share = lists->shares[static_cast<size_t>(at)];
    --share.copies;
    DispatchLists::Rank& rank = lists->ranks[static_cast<size_t>(share.rank)];
    const auto token = static_cast<int32_t>(i / static_cast<size_t>(top_k));
    if (rank.tokens.empty() || rank.tokens.back() != token) rank.tokens.push_back(token);
    const int64_t copy = lists->first[static_cast<size_t>(at)]++;
    rank.copy_row[static_cast<size_t>(copy)] = static_cast<int32_t>(rank.tokens.size()) - 1;
    lists->row_of[i] = static_cast<int32_t>(rank.combine_row + HeaderRows(row_bytes) + copy);
  }
  for (size_t e = 0; e < num_experts; ++e) {  // every copy of the plan was found
    SY_CHECK_EQ(lists->taken[e], plan.CopiesOf(source, static_cast<int32_t>(e)));
  }
}

size_t WriteCounts(const ExchangeKey& key, int32_t source, std::span<const int32_t> counts,
                   std::span<std::byte> out) {
  ExchangeHeader header = MakeHeader(key, ExchangeKind::kCounts, source);
  header.num_experts = static_cast<int32_t>(counts.size());
  const size_t bytes = sizeof(header) + counts.size_bytes();
  SY_CHECK_LE(bytes, out.size());
  std::memcpy(out.data(), &header, sizeof(header));
  if (!counts.empty()) std::memcpy(out.data() + sizeof(header), counts.data(), counts.size_bytes());
  return bytes;
}

size_t WriteDispatch(const ExchangeKey& key, const DispatchPlan& plan, int32_t source,
                     int32_t expert_rank, const DispatchLists& lists, const std::byte* rows,
                     int32_t row_bytes, std::span<const int32_t> counts, std::span<std::byte> out) {
  const DispatchLists::Rank& rank = lists.ranks[static_cast<size_t>(expert_rank)];
  ExchangeHeader header = MakeHeader(key, ExchangeKind::kDispatch, source);
  header.plan_hash = plan.hash;
  header.expert_rank = expert_rank;
  header.num_rows = static_cast<int32_t>(rank.tokens.size());
  header.num_copies = static_cast<int32_t>(rank.copy_row.size());
  header.row_bytes = row_bytes;
  header.num_experts = plan.num_experts;
  header.folded_counts = header.num_participants == 1 ? 1 : 0;
  if (header.folded_counts == 0) counts = {};

  const auto row_size = static_cast<size_t>(row_bytes);
  const size_t padded = PaddedHeader(row_bytes);
  const size_t copies_at = padded + rank.tokens.size() * row_size;
  const size_t counts_at = copies_at + rank.copy_row.size() * sizeof(int32_t);
  const size_t bytes = counts_at + counts.size_bytes();
  SY_CHECK_LE(bytes, out.size());
  SY_CHECK(header.folded_counts == 0 || counts.size() == static_cast<size_t>(plan.num_experts));
  std::memcpy(out.data(), &header, sizeof(header));
  std::memset(out.data() + sizeof(header), 0, padded - sizeof(header));
  std::byte* to = out.data() + padded;
  for (int32_t token : rank.tokens) {
    std::memcpy(to, rows + static_cast<size_t>(token) * row_size, row_size);
    to += row_size;
  }
  if (!rank.copy_row.empty()) {
    std::memcpy(out.data() + copies_at, rank.copy_row.data(),
                rank.copy_row.size() * sizeof(int32_t));
  }
  if (!counts.empty()) std::memcpy(out.data() + counts_at, counts.data(), counts.size_bytes());
  return bytes;
}

size_t CombineBytes(const DispatchLists& lists, int32_t expert_rank, int32_t row_bytes) {
  const size_t copies = lists.ranks[static_cast<size_t>(expert_rank)].copy_row.size();
  return PaddedHeader(row_bytes) + copies * static_cast<size_t>(row_bytes);
}

absl::Status CheckCombine(std::span<const std::byte> message, const ExchangeKey& key,
                          const DispatchPlan& plan, int32_t source, int32_t expert_rank,
                          int32_t row_bytes) {
  HeaderCheck check(message, key, ExchangeKind::kCombine, source);
  const int64_t copies = CopiesFor(plan, source, expert_rank);
  check.Expect("plan_hash", check.header().plan_hash, plan.hash);
  check.Expect("expert_rank", check.header().expert_rank, expert_rank);
  check.Expect("row_bytes", check.header().row_bytes, row_bytes);
  check.Expect("num_copies", check.header().num_copies, copies);
  check.Expect(
      "bytes", message.size(),
      PaddedHeader(row_bytes) + static_cast<size_t>(copies) * static_cast<size_t>(row_bytes));
  return check.status();
}

absl::Status ParseCounts(std::span<const std::byte> message, const ExchangeKey& key, int32_t source,
                         const ExchangeShape& shape, std::span<int32_t> counts) {
  SY_CHECK_EQ(counts.size(), static_cast<size_t>(shape.num_experts));
  const bool folded = key.step->participants.size() == 1;
  HeaderCheck check(message, key, folded ? ExchangeKind::kDispatch : ExchangeKind::kCounts, source);
  check.Expect("num_experts", check.header().num_experts, shape.num_experts);
  if (folded) check.Expect("folded_counts", check.header().folded_counts, 1);
  const size_t least = sizeof(ExchangeHeader) + counts.size_bytes();
  if (folded && message.size() < least) check.Expect("bytes", message.size(), least);
  if (!folded) check.Expect("bytes", message.size(), least);
  if (!check.status().ok()) return check.status();

  if (!counts.empty()) {
    // Both kinds end with the counts.
    std::memcpy(counts.data(), message.data() + message.size() - counts.size_bytes(),
                counts.size_bytes());
  }
  int64_t total = 0;
  for (int32_t count : counts) {  // a token has an expert at most once
    check.ExpectRange("copies of one expert", count, shape.max_rows);
    total += count;
  }
  check.ExpectRange("copies", total, static_cast<int64_t>(shape.max_rows) * shape.top_k);
  return check.status();
}

absl::Status CheckTotalCopies(std::span<const int32_t> counts, const ExchangeShape& shape) {
  int64_t total = 0;
  for (int32_t count : counts) total += count;
  if (total <= int64_t{shape.max_rows} * shape.top_k) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(total, " rows of all participants exceed ",
                                                   shape.max_rows, " tokens x ", shape.top_k,
                                                   " experts"));
}

absl::StatusOr<DispatchView> ParseDispatch(std::span<const std::byte> message,
                                           const ExchangeKey& key, const DispatchPlan& plan,
                                           int32_t source, int32_t expert_rank,
                                           const ExchangeShape& shape) {
  const bool folded = key.step->participants.size() == 1;
  HeaderCheck check(message, key, ExchangeKind::kDispatch, source);
  const ExchangeHeader& header = check.header();
  check.Expect("plan_hash", header.plan_hash, plan.hash);
  check.Expect("expert_rank", header.expert_rank, expert_rank);
  check.Expect("row_bytes", header.row_bytes, shape.row_bytes);
  check.Expect("num_experts", header.num_experts, shape.num_experts);
  check.Expect("folded_counts", header.folded_counts, folded ? 1 : 0);
  check.Expect("num_copies", header.num_copies, CopiesFor(plan, source, expert_rank));
  check.ExpectRange("num_rows", header.num_rows,
                    std::min(shape.max_rows, std::max(header.num_copies, 0)));
  if (!check.status().ok()) return check.status();

  const auto num_rows = static_cast<size_t>(header.num_rows);
  const auto num_copies = static_cast<size_t>(header.num_copies);
  const size_t copies_at =
      PaddedHeader(shape.row_bytes) + num_rows * static_cast<size_t>(shape.row_bytes);
  check.Expect("bytes", message.size(),
               copies_at + (num_copies + (folded ? static_cast<size_t>(shape.num_experts) : 0)) *
                               sizeof(int32_t));
  if (!check.status().ok()) return check.status();

  DispatchView view;
  view.rows = message.data() + PaddedHeader(shape.row_bytes);
  view.copies = message.data() + copies_at;
  view.num_rows = header.num_rows;
  view.num_copies = header.num_copies;
  int64_t copy = 0;
  for (int32_t e = 0; e < plan.num_experts; ++e) {
    int32_t previous = -1;  // within an expert each row stands once
    for (int64_t left = CopiesFor(plan, source, e, expert_rank); left > 0; --left, ++copy) {
      const int32_t row = LoadIndex(view.copies, copy);
      if (row <= previous || row >= view.num_rows) {
        return absl::InvalidArgumentError(absl::StrCat(
            "dispatch message of source ", source, ": copy ", copy, " of expert ", e, " is row ",
            row, ", expected more than ", previous, " and less than ", view.num_rows));
      }
      previous = row;
    }
  }
  return view;
}

void BuildExpertBatch(const DispatchPlan& plan, int32_t expert_rank, ExpertBatch* batch) {
  batch->groups.clear();
  batch->blocks.clear();
  batch->source_rows.assign(static_cast<size_t>(plan.num_sources), 0);
  batch->num_rows = 0;
  for (int32_t e = 0; e < plan.num_experts; ++e) {
    const int64_t begin = batch->num_rows;
    for (int32_t source = 0; source < plan.num_sources; ++source) {
      const int64_t copies = CopiesFor(plan, source, e, expert_rank);
      if (copies == 0) continue;
      int64_t& message_row = batch->source_rows[static_cast<size_t>(source)];
      batch->blocks.push_back({source, static_cast<int32_t>(copies), batch->num_rows, message_row});
      message_row += copies;
      batch->num_rows += copies;
    }
    if (batch->num_rows > begin) batch->groups.push_back({e, begin, batch->num_rows});
  }
}

void GatherRows(const ExpertBatch& batch, size_t begin, size_t end,
                std::span<const DispatchView> messages, int32_t row_bytes, std::byte* grouped) {
  for (size_t b = begin; b < end; ++b) {
    const ExpertBatch::Block& block = batch.blocks[b];
    const DispatchView& message = messages[static_cast<size_t>(block.source)];
    std::byte* to = grouped + block.grouped_row * row_bytes;
    for (int64_t i = 0; i < block.num_rows; ++i, to += row_bytes) {
      const int64_t row = LoadIndex(message.copies, block.message_row + i);
      std::memcpy(to, message.rows + row * row_bytes, static_cast<size_t>(row_bytes));
    }
  }
}

size_t WriteCombineHeader(const ExchangeKey& key, const DispatchPlan& plan,
                          const ExpertBatch& batch, int32_t source, int32_t expert_rank,
                          int32_t row_bytes, std::span<std::byte> message) {
  const int64_t copies = batch.source_rows[static_cast<size_t>(source)];
  ExchangeHeader header = MakeHeader(key, ExchangeKind::kCombine, source);
  header.plan_hash = plan.hash;
  header.expert_rank = expert_rank;
  header.num_rows = static_cast<int32_t>(copies);
  header.num_copies = static_cast<int32_t>(copies);
  header.row_bytes = row_bytes;
  header.num_experts = plan.num_experts;
  const size_t padded = PaddedHeader(row_bytes);
  const size_t bytes = padded + static_cast<size_t>(copies) * static_cast<size_t>(row_bytes);
  SY_CHECK_LE(bytes, message.size());
  std::memcpy(message.data(), &header, sizeof(header));
  std::memset(message.data() + sizeof(header), 0, padded - sizeof(header));
  return bytes;
}

ExchangeHeader MakeWeightsHeader(const ExchangeKey& key, const DispatchPlan& plan,
                                 const WeightMove& move) {
  ExchangeHeader header = MakeHeader(key, ExchangeKind::kWeights, move.from_rank);
  header.plan_hash = plan.hash;
  header.expert_rank = move.to_rank;
  header.num_rows = move.expert;
  header.num_copies = move.slot;
  return header;
}

absl::Status CheckWeightsHeader(std::span<const std::byte> message, const ExchangeKey& key,
                                const DispatchPlan& plan, const WeightMove& move) {
  HeaderCheck check(message, key, ExchangeKind::kWeights, move.from_rank);
  check.Expect("plan_hash", check.header().plan_hash, plan.hash);
  check.Expect("expert_rank", check.header().expert_rank, move.to_rank);
  check.Expect("expert", check.header().num_rows, move.expert);
  check.Expect("slot", check.header().num_copies, move.slot);
  return check.status();
}

void ScatterResults(const ExpertBatch& batch, size_t begin, size_t end, const std::byte* results,
                    int32_t row_bytes, std::span<std::byte* const> messages) {
  for (size_t b = begin; b < end; ++b) {
    const ExpertBatch::Block& block = batch.blocks[b];
    std::byte* to = messages[static_cast<size_t>(block.source)] + PaddedHeader(row_bytes) +
                    block.message_row * row_bytes;
    std::memcpy(to, results + block.grouped_row * row_bytes,
                static_cast<size_t>(block.num_rows) * static_cast<size_t>(row_bytes));
  }
}

}  // namespace switchyard
