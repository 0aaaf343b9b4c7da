#include "worker/expert_rank.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

std::span<std::byte> Whole(const Buffer& buffer) { return {buffer.data(), buffer.bytes()}; }

// Below this many bytes one thread copies faster than several can be woken.
constexpr int64_t kParallelCopyBytes = 1 << 18;

int64_t MaxCopies(const ExchangeShape& shape) { return int64_t{shape.max_rows} * shape.top_k; }

}  // namespace

ExpertRank::ExpertRank(const ExpertRankOptions& options,
                       std::shared_ptr<const ExpertWeights> weights,
                       std::shared_ptr<const ExpertPlacement> placement,
                       std::unique_ptr<ComputeBackend> backend, ThreadPool* pool,
                       Communicator* communicator)
    : options_(options),
      weights_(std::move(weights)),
      backend_(std::move(backend)),
      pool_(pool),
      communicator_(communicator),
      planner_(std::move(placement), options.planner),
      foreign_({.expert_rank = options.expert_rank,
                .ranks = options.ranks,
                .num_moe_layers = options.num_moe_layers,
                .slots = options.planner.foreign_slots_per_rank,
                .width = options.expert_width,
                .hidden = options.hidden,
                .formats = options.slot_formats},
               weights_, backend_.get(), communicator) {
  const ExchangeShape& shape = options_.exchange;
  for (int32_t m = 0; m < kMaxMicroBatches; ++m) {
    Incoming& incoming = incoming_[static_cast<size_t>(m)];
    incoming.shape = OfMicroBatch(shape, m);
    for (int32_t i = 0; i < options_.ranks.num_attention; ++i) {
      incoming.counts_messages.emplace_back(MaxCountsBytes(incoming.shape));
      incoming.dispatch_messages.emplace_back(MaxDispatchBytes(incoming.shape),
                                              Buffer::Pages::kNow);
    }
  }
  const size_t row_bytes = static_cast<size_t>(shape.row_bytes);
  const auto rows = [&](int64_t n) {
    return Buffer(static_cast<size_t>(n) * row_bytes, Buffer::Pages::kNow);
  };
  grouped_ = rows(MaxCopies(shape));
  results_ = rows(MaxCopies(shape));
  combine_ = rows(MaxCombineRows(shape, options_.ranks.num_attention));
  backend_->Reserve(MaxCalls(shape, weights_->dtype, options_.hidden, options_.expert_width));
}

int64_t ExpertRank::BufferBytes(const ExchangeShape& shape, const CellRanks& ranks) {
  int64_t bytes =
      (2 * MaxCopies(shape) + MaxCombineRows(shape, ranks.num_attention)) * shape.row_bytes;
  for (int32_t m = 0; m < kMaxMicroBatches; ++m) {
    const ExchangeShape of = OfMicroBatch(shape, m);
    bytes += ranks.num_attention * static_cast<int64_t>(MaxDispatchBytes(of) + MaxCountsBytes(of));
  }
  return bytes;
}

ScratchLimits ExpertRank::MaxCalls(const ExchangeShape& shape, DType act, int64_t hidden,
                                   int64_t width) {
  return {.act = act, .mlp_rows = MaxCopies(shape), .mlp_hidden = hidden, .mlp_width = width};
}

absl::Status ExpertRank::At(int32_t layer, uint64_t step, const absl::Status& status) const {
  if (status.ok()) return status;
  return absl::Status(status.code(),
                      absl::StrCat("expert rank ", options_.expert_rank, " at step ", step,
                                   ", MoE layer ", layer, ": ", std::string(status.message())));
}

absl::Status ExpertRank::BeginStep(const StepHeader& step) {
  if (absl::Status status = CheckParticipants(step, options_.ranks); !status.ok()) return status;
  planner_.BeginGeneration(step.slots_generation);
  const auto micro_batches = static_cast<int32_t>(step.micro_batches);
  for (int32_t m = 0; m < micro_batches && options_.num_moe_layers > 0; ++m) {
    absl::Status status = communicator_->Start(m, {}, Receives(step, 0, m));
    if (!status.ok()) return At(0, step.step, status);
  }
  return absl::OkStatus();
}

absl::Status ExpertRank::Compute(const ExchangeKey& key) {
  absl::Status status = communicator_->Wait(key.micro_batch, DataDeadline());
  if (status.ok()) status = Plan(key);
  if (status.ok()) status = ComputeHere(key);
  return At(key.layer, key.step->step, status);
}

absl::Status ExpertRank::Answer(const ExchangeKey& key) {
  absl::Status status = ComputeMoved();
  options_.counters->progress.fetch_add(1, std::memory_order_relaxed);
  if (status.ok()) {
    WriteResults(key);
    status = SendResults(key);
  }
  return At(key.layer, key.step->step, status);
}

std::span<RecvOp> ExpertRank::Receives(const StepHeader& step, int32_t layer, int32_t micro_batch) {
  Incoming& incoming = incoming_[static_cast<size_t>(micro_batch)];
  incoming.recvs.clear();
  for (int32_t participant : step.participants) {
    const size_t p = static_cast<size_t>(participant);
    const MessageTag tag{step.step, layer, micro_batch, MessageKind::kDispatch};
    incoming.recvs.push_back({participant, tag, Whole(incoming.dispatch_messages[p]), 0});
  }
  if (step.participants.size() > 1) {
    for (int32_t participant : step.participants) {
      const size_t p = static_cast<size_t>(participant);
      const MessageTag tag{step.step, layer, micro_batch, MessageKind::kCounts};
      incoming.recvs.push_back({participant, tag, Whole(incoming.counts_messages[p]), 0});
    }
  }
  return incoming.recvs;
}

absl::Status ExpertRank::Plan(const ExchangeKey& key) {
  const StepHeader& step = *key.step;
  const size_t num_sources = step.participants.size();
  const auto& [shape, recvs, counts_messages, dispatch_messages] =
      incoming_[static_cast<size_t>(key.micro_batch)];
  const size_t num_experts = static_cast<size_t>(shape.num_experts);
  const auto from_rank = [&](size_t source, const absl::Status& status) {
    return absl::InternalError(absl::StrCat("attention rank ", step.participants[source], ": ",
                                            std::string(status.message())));
  };
  counts_.resize(num_sources * num_experts);
  for (size_t s = 0; s < num_sources; ++s) {
    const RecvOp& recv = recvs[num_sources > 1 ? num_sources + s : s];
    const absl::Status status =
        ParseCounts(recv.buffer.first(recv.received), key, static_cast<int32_t>(s), shape,
                    std::span(counts_).subspan(s * num_experts, num_experts));
    if (!status.ok()) return from_rank(s, status);
  }
  absl::Status total = CheckTotalCopies(counts_, shape);
  if (!total.ok()) return total;
  const auto plan_start = std::chrono::steady_clock::now();
  planner_.Plan(counts_, static_cast<int32_t>(num_sources), key.layer, &plan_);
  CountPlan(std::chrono::steady_clock::now() - plan_start);
  views_.clear();
  for (size_t s = 0; s < num_sources; ++s) {
    const absl::StatusOr<DispatchView> view =
        ParseDispatch(recvs[s].buffer.first(recvs[s].received), key, plan_, static_cast<int32_t>(s),
                      options_.expert_rank, shape);
    if (!view.ok()) return from_rank(s, view.status());
    views_.push_back(*view);
  }
  BuildExpertBatch(plan_, options_.expert_rank, &batch_);
  return absl::OkStatus();
}

void ExpertRank::CountPlan(std::chrono::nanoseconds duration) {
  if (plan_.total_copies == 0) return;  // an empty micro-batch
  constexpr double kPpm = 1e6;
  WorkerCounters& counters = *options_.counters;
  const auto add = [](std::atomic<uint64_t>& total, double value) {
    total.fetch_add(static_cast<uint64_t>(value), std::memory_order_relaxed);
  };
  add(counters.plans, 1);
  add(counters.plan_ns, static_cast<double>(duration.count()));
  const double mean = static_cast<double>(plan_.total_copies) / plan_.num_ranks;
  add(counters.balancedness_ppm, kPpm * mean / static_cast<double>(plan_.max_rank_copies));
  add(counters.plan_gap_ppm, kPpm * plan_.Gap());
}

absl::Status ExpertRank::ComputeHere(const ExchangeKey& key) {
  // Weights travel while the experts that are here compute.
  const absl::StatusOr<bool> moving = foreign_.Start(key, plan_);
  if (!moving.ok()) return moving.status();
  moving_ = *moving;
  GatherBatch();
  FindGroups(key.layer);
  RunGroups(groups_);
  return absl::OkStatus();
}

absl::Status ExpertRank::ComputeMoved() {
  if (!moving_) return absl::OkStatus();
  moving_ = false;
  if (absl::Status status = foreign_.Finish(); !status.ok()) return status;
  RunGroups(late_groups_);
  return absl::OkStatus();
}

void ExpertRank::GatherBatch() {
  const int32_t row_bytes = options_.exchange.row_bytes;
  const int64_t num_blocks = static_cast<int64_t>(batch_.blocks.size());
  if (batch_.num_rows * row_bytes < kParallelCopyBytes) {
    GatherRows(batch_, 0, batch_.blocks.size(), views_, row_bytes, grouped_.data());
  } else {
    pool_->ParallelFor(num_blocks, [&](int64_t b) {
      GatherRows(batch_, static_cast<size_t>(b), static_cast<size_t>(b) + 1, views_, row_bytes,
                 grouped_.data());
    });
  }
}

const MlpWeights& ExpertRank::Foreign(int32_t layer, int32_t expert) const {
  const std::span<const int32_t> slots = planner_.ForeignExperts(layer, options_.expert_rank);
  const auto slot = std::ranges::find(slots, expert);
  SY_CHECK(slot != slots.end());
  return foreign_.Slot(layer, static_cast<int32_t>(slot - slots.begin()));
}

void ExpertRank::FindGroups(int32_t layer) {
  groups_.clear();
  late_groups_.clear();
  WorkerCounters& counters = *options_.counters;
  counters.rows.fetch_add(static_cast<uint64_t>(batch_.num_rows), std::memory_order_relaxed);
  for (const ExpertBatch::Group& group : batch_.groups) {
    const size_t expert = static_cast<size_t>(group.expert);
    const MlpWeights* mlp = weights_->experts[static_cast<size_t>(layer)][expert].get();
    const bool late = std::ranges::any_of(plan_.moves, [&](const WeightMove& move) {
      return move.to_rank == options_.expert_rank && move.expert == group.expert;
    });
    if (mlp == nullptr) {
      mlp = &Foreign(layer, group.expert);
      counters.foreign_copies.fetch_add(static_cast<uint64_t>(group.end - group.begin),
                                        std::memory_order_relaxed);
    }
    if (late) {
      counters.weights_received.fetch_add(1, std::memory_order_relaxed);
      counters.weight_bytes_received.fetch_add(
          mlp->gate_up.storage.bytes() + mlp->down.storage.bytes(), std::memory_order_relaxed);
    }
    (late ? late_groups_ : groups_).push_back({mlp, group.begin, group.end});
    counters.weight_bytes_read.fetch_add(mlp->gate_up.storage.bytes() + mlp->down.storage.bytes(),
                                         std::memory_order_relaxed);
    const size_t load =
        static_cast<size_t>(layer) * static_cast<size_t>(options_.exchange.num_experts) + expert;
    counters.expert_copies[load].fetch_add(static_cast<uint64_t>(group.end - group.begin),
                                           std::memory_order_relaxed);
  }
}

void ExpertRank::RunGroups(std::span<const MlpGroup> groups) {
  if (groups.empty()) return;
  backend_->GroupedMlp(grouped_.View(weights_->dtype, {batch_.num_rows, options_.hidden}), groups,
                       results_.View(weights_->dtype, {batch_.num_rows, options_.hidden}));
  backend_->Synchronize();
}

void ExpertRank::WriteResults(const ExchangeKey& key) {
  const StepHeader& step = *key.step;
  const int32_t row_bytes = options_.exchange.row_bytes;
  const MessageTag tag{step.step, key.layer, key.micro_batch, MessageKind::kCombine};
  combine_messages_.clear();
  sends_.clear();
  size_t at = 0;
  for (size_t s = 0; s < step.participants.size(); ++s) {
    const std::span<std::byte> room = Whole(combine_).subspan(at);
    const size_t bytes = WriteCombineHeader(key, plan_, batch_, static_cast<int32_t>(s),
                                            options_.expert_rank, row_bytes, room);
    combine_messages_.push_back(room.data());
    sends_.push_back({step.participants[s], tag, room.first(bytes)});
    at += bytes;
  }
  if (batch_.num_rows * row_bytes < kParallelCopyBytes) {
    ScatterResults(batch_, 0, batch_.blocks.size(), results_.data(), row_bytes, combine_messages_);
  } else {
    pool_->ParallelFor(static_cast<int64_t>(batch_.blocks.size()), [&](int64_t b) {
      ScatterResults(batch_, static_cast<size_t>(b), static_cast<size_t>(b) + 1, results_.data(),
                     row_bytes, combine_messages_);
    });
  }
}

// And asks for the next layer's rows. Where they are what this rank waits for next, both go at
// once, which saves a packet and a look at it; the other micro-batch would overwrite results that
// are still being sent.
absl::Status ExpertRank::SendResults(const ExchangeKey& key) {
  const bool last = key.layer + 1 == options_.num_moe_layers;
  const bool at_once = !last && key.step->micro_batches == 1;
  const std::span<RecvOp> next =
      last ? std::span<RecvOp>() : Receives(*key.step, key.layer + 1, key.micro_batch);
  if (at_once) return communicator_->Start(key.micro_batch, sends_, next);
  absl::Status status = communicator_->Start(key.micro_batch, sends_, {});
  if (status.ok()) status = communicator_->Wait(key.micro_batch, DataDeadline());
  return status.ok() && !last ? communicator_->Start(key.micro_batch, {}, next) : status;
}

}  // namespace switchyard
