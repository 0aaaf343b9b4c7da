// Exchange layout: the bytes of the count, dispatch and combine messages of one (step, layer,
// micro-batch), and the index lists on both sides. It knows no transport: callers give spans and
// send them. Pure functions over values; the list structs are scratch that their owner thread
// reuses, so nothing grows after the largest step. What a peer sent is never trusted: every Parse
// function checks all numbers and returns kInvalidArgument naming them.
//
// A message starts with ExchangeHeader (little-endian), padded to whole rows, so that a combine
// message received into a [rows, hidden] tensor has its result rows at row indices of that tensor:
//
//   counts:    header | num_experts x i32: copies that the source has for each expert
//   dispatch:  header, padded to HeaderRows | num_rows rows, one per (token, rank), tokens
//   ascending
//              | num_copies x i32: row index of each copy; expert-major (experts ascending, rows
//              ascending) | num_experts x i32 counts, only when the step has one participant (the
//              count message is folded in)
//   combine:   header, padded to HeaderRows | num_copies result rows, in the order of the copies of
//   the dispatch message
//
// How many copies of an expert a message carries is not in it: both sides take that from the plan,
// whose hash is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/dispatch_plan.h"
#include "proto/step_plan.h"

namespace switchyard {

enum class ExchangeKind : uint16_t { kCounts = 1, kDispatch = 2, kCombine = 3, kWeights = 4 };

// The fixed struct at the start of every message. `source` is the attention worker's index among
// the participants, in weights the expert rank that sends them; `expert_rank` is -1 in counts.
// Weights go from expert rank to expert rank, a header and then the packed bytes as messages of
// their own (parts of one tag), so that they are not copied; num_rows is then the expert,
// num_copies the slot.
struct ExchangeHeader {
  uint32_t magic = 0;
  uint16_t version = 0;
  uint16_t kind = 0;
  uint64_t epoch = 0;
  uint64_t step = 0;
  uint64_t slots_generation = 0;
  uint64_t plan_hash = 0;          // 0 in counts
  uint64_t participants_hash = 0;  // of StepHeader::participants and micro_batches
  int32_t layer = 0;
  int32_t micro_batch = 0;
  int32_t source = 0;
  int32_t expert_rank = 0;
  int32_t num_rows = 0;
  int32_t num_copies = 0;
  int32_t row_bytes = 0;
  int32_t num_experts = 0;
  int32_t num_participants = 0;
  int32_t folded_counts = 0;  // 1: the counts stand at the end of this dispatch message
};

// Fixed at start: what a worker's rows look like and how many there can be.
struct ExchangeShape {
  int32_t row_bytes = 0;  // one row of hidden state in the activation type
  int32_t num_experts = 0;
  int32_t top_k = 0;
  int32_t max_rows = 0;  // rows of all sources together in one micro-batch
};

// A step has one micro-batch, or two that are under way at a time. Each source cuts its rows in
// two, the first half the larger; the second may be empty, its messages travel all the same.
constexpr int32_t kMaxMicroBatches = 2;
inline int64_t RowsOfFirstMicroBatch(int64_t rows, uint32_t micro_batches) {
  return micro_batches > 1 ? (rows + 1) / 2 : rows;
}
// `shape` is that of a step in one; the second micro-batch has at most half of a step's rows.
inline ExchangeShape OfMicroBatch(ExchangeShape shape, int32_t micro_batch) {
  if (micro_batch > 0) shape.max_rows /= 2;
  return shape;
}

// Which exchange of a step this is. `step` must outlive the call.
struct ExchangeKey {
  const StepHeader* step = nullptr;
  int32_t layer = 0;  // MoE layer index, the placement's
  int32_t micro_batch = 0;
};

// ---- sizes: buffers are allocated once from these ----
int32_t HeaderRows(int32_t row_bytes);  // rows that the padded header takes
size_t MaxCountsBytes(const ExchangeShape& shape);
size_t MaxDispatchBytes(const ExchangeShape& shape);
// Rows of the tensor into which a source receives the combine messages of all ranks, headers
// included.
int64_t MaxCombineRows(const ExchangeShape& shape, int32_t num_expert_ranks);

// ---- attention side ----

// One source's rows of one micro-batch, spread over the expert ranks. Reused from layer to layer.
struct DispatchLists {
  struct Rank {
    std::vector<int32_t> tokens;    // [num_rows] batch row of each message row, ascending
    std::vector<int32_t> copy_row;  // [num_copies] message row of each copy, expert-major
    int64_t combine_row =
        0;  // first row of this rank's combine message (its header) in the combine tensor
  };
  std::vector<Rank> ranks;
  std::vector<int32_t>
      row_of;  // [rows * top_k] row of the combine tensor that holds the result; -1: no such expert
  int64_t combine_rows = 0;  // rows of the combine tensor in use, headers included

  // Scratch of BuildDispatchLists.
  std::vector<DispatchShare> shares;  // of this source, by expert; what is left of each
  std::vector<int32_t> share_of;  // [num_experts] share from which the expert's next copy is taken
  std::vector<int32_t> taken;     // [num_experts] copies already taken
  std::vector<int64_t> first;     // [shares] index of the share's next copy in its rank's message
};

// counts[e] = how often e stands in ids. ids: [rows, top_k], -1 for none. REQUIRES: ids <
// counts.size().
void CountExperts(std::span<const int32_t> ids, std::span<int32_t> counts);

// Which rows go to which rank and where each (token, k) finds its result. ids: [rows, top_k], -1
// for none; the plan was made from CountExperts(ids) for this `source` (index among the
// participants). CHECKs that the plan fits the ids.
void BuildDispatchLists(std::span<const int32_t> ids, int32_t top_k, const DispatchPlan& plan,
                        int32_t source, int32_t row_bytes, DispatchLists* lists);

// The two messages of a source. `out` must hold MaxCountsBytes / MaxDispatchBytes; returns the
// bytes written. rows: [num_tokens, row_bytes]. `counts` (num_experts) is folded in when the step
// has one participant.
size_t WriteCounts(const ExchangeKey& key, int32_t source, std::span<const int32_t> counts,
                   std::span<std::byte> out);
size_t WriteDispatch(const ExchangeKey& key, const DispatchPlan& plan, int32_t source,
                     int32_t expert_rank, const DispatchLists& lists, const std::byte* rows,
                     int32_t row_bytes, std::span<const int32_t> counts, std::span<std::byte> out);
// Exact bytes of the combine message that `expert_rank` owes this source.
size_t CombineBytes(const DispatchLists& lists, int32_t expert_rank, int32_t row_bytes);
// Checks a received combine message; its rows then are at lists.ranks[expert_rank].combine_row +
// HeaderRows.
absl::Status CheckCombine(std::span<const std::byte> message, const ExchangeKey& key,
                          const DispatchPlan& plan, int32_t source, int32_t expert_rank,
                          int32_t row_bytes);

// ---- both sides ----

// Copies the counts of `source` out of its count message, or out of its dispatch message when they
// are folded in. counts: [num_experts].
absl::Status ParseCounts(std::span<const std::byte> message, const ExchangeKey& key, int32_t source,
                         const ExchangeShape& shape, std::span<int32_t> counts);
// The counts of all sources: together no more than a step may have. Before the plan.
absl::Status CheckTotalCopies(std::span<const int32_t> counts, const ExchangeShape& shape);

// ---- expert side ----

// A checked dispatch message. Views the message's bytes.
struct DispatchView {
  const std::byte* rows = nullptr;    // [num_rows, row_bytes]
  const std::byte* copies = nullptr;  // [num_copies] i32, unaligned
  int32_t num_rows = 0;
  int32_t num_copies = 0;
};
absl::StatusOr<DispatchView> ParseDispatch(std::span<const std::byte> message,
                                           const ExchangeKey& key, const DispatchPlan& plan,
                                           int32_t source, int32_t expert_rank,
                                           const ExchangeShape& shape);

// The copies of all sources grouped by expert: row order is expert, then source, then the message's
// order. A block is contiguous both among the grouped rows and in the source's combine message.
struct ExpertBatch {
  struct Group {  // grouped rows [begin, end) go through `expert`
    int32_t expert = 0;
    int64_t begin = 0;
    int64_t end = 0;
  };
  struct Block {
    int32_t source = 0;
    int32_t num_rows = 0;
    int64_t grouped_row = 0;  // first row among the grouped rows
    int64_t message_row = 0;  // first row among the copies of the source's message
  };
  std::vector<Group> groups;  // only experts with rows, ascending
  std::vector<Block> blocks;  // in grouped order
  std::vector<int64_t>
      source_rows;  // [num_sources] rows of each combine message, headers not included
  int64_t num_rows = 0;
};
void BuildExpertBatch(const DispatchPlan& plan, int32_t expert_rank, ExpertBatch* batch);

// grouped[i] = the message row of grouped row i, for the blocks [begin, end) of the batch (so that
// threads can share the work). messages: [num_sources].
void GatherRows(const ExpertBatch& batch, size_t begin, size_t end,
                std::span<const DispatchView> messages, int32_t row_bytes, std::byte* grouped);

// A combine message: header, then room for its rows; then blocks [begin, end) of the results copied
// in. message: at least (HeaderRows + source_rows) * row_bytes; returns its size in bytes.
size_t WriteCombineHeader(const ExchangeKey& key, const DispatchPlan& plan,
                          const ExpertBatch& batch, int32_t source, int32_t expert_rank,
                          int32_t row_bytes, std::span<std::byte> message);
// The header of a move's weights, at the sender and checked at the receiver.
ExchangeHeader MakeWeightsHeader(const ExchangeKey& key, const DispatchPlan& plan,
                                 const WeightMove& move);
absl::Status CheckWeightsHeader(std::span<const std::byte> message, const ExchangeKey& key,
                                const DispatchPlan& plan, const WeightMove& move);
// results: [num_rows, row_bytes] in grouped order; messages: [num_sources] starts of the combine
// messages.
void ScatterResults(const ExpertBatch& batch, size_t begin, size_t end, const std::byte* results,
                    int32_t row_bytes, std::span<std::byte* const> messages);

}  // namespace switchyard
