#include "worker/moe_exchange.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

static_assert(kMaxMicroBatches <= Communicator::kNumGroups);

std::span<std::byte> Whole(const Buffer& buffer) { return {buffer.data(), buffer.bytes()}; }

}  // namespace

absl::Status CheckParticipants(const StepHeader& step, const CellRanks& ranks) {
  int32_t previous = -1;
  for (int32_t rank : step.participants) {
    if (rank <= previous || rank >= ranks.num_attention) {
      return absl::InvalidArgumentError(absl::StrCat("step ", step.step, ": participant ", rank,
                                                     " after ", previous, " of ",
                                                     ranks.num_attention, " attention ranks"));
    }
    previous = rank;
  }
  if (previous < 0)
    return absl::InvalidArgumentError(absl::StrCat("step ", step.step, " has no participants"));
  if (step.micro_batches < 1 || step.micro_batches > kMaxMicroBatches) {
    return absl::InvalidArgumentError(absl::StrCat("step ", step.step, " has ", step.micro_batches,
                                                   " micro-batches, not 1 to ", kMaxMicroBatches));
  }
  return absl::OkStatus();
}

MoeExchange::MoeExchange(const ExchangeShape& shape, DType act, const CellRanks& ranks,
                         std::shared_ptr<const ExpertPlacement> placement,
                         const PlannerOptions& planner, Communicator* communicator)
    : act_(act),
      ranks_(ranks),
      communicator_(communicator),
      planner_(std::move(placement), planner) {
  for (int32_t m = 0; m < kMaxMicroBatches; ++m) {
    Flight& flight = flights_[static_cast<size_t>(m)];
    flight.shape = OfMicroBatch(shape, m);
    flight.counts_message = Buffer(MaxCountsBytes(flight.shape));
    flight.combined = Buffer(static_cast<size_t>(MaxCombineRows(flight.shape, ranks.num_experts)) *
                                 static_cast<size_t>(shape.row_bytes),
                             Buffer::Pages::kNow);
    for (int32_t i = 0; i < ranks.num_attention; ++i)
      flight.counts_received.emplace_back(MaxCountsBytes(flight.shape));
    for (int32_t i = 0; i < ranks.num_experts; ++i)
      flight.dispatch_messages.emplace_back(MaxDispatchBytes(flight.shape), Buffer::Pages::kNow);
  }
}

int64_t MoeExchange::BufferBytes(const ExchangeShape& shape, const CellRanks& ranks) {
  int64_t bytes = 0;
  for (int32_t m = 0; m < kMaxMicroBatches; ++m) {
    const ExchangeShape of = OfMicroBatch(shape, m);
    bytes += MaxCombineRows(of, ranks.num_experts) * of.row_bytes +
             ranks.num_experts * static_cast<int64_t>(MaxDispatchBytes(of)) +
             (ranks.num_attention + 1) * static_cast<int64_t>(MaxCountsBytes(of));
  }
  return bytes;
}

absl::Status MoeExchange::Wait(int32_t micro_batch) {
  const auto start = std::chrono::steady_clock::now();
  absl::Status status = communicator_->Wait(micro_batch, DataDeadline());
  waited_ += std::chrono::steady_clock::now() - start;
  return status;
}

absl::Status MoeExchange::ExchangeCounts(Flight& flight) {
  const StepHeader& step = *flight.key.step;
  const int32_t group = flight.key.micro_batch;
  const size_t num_experts = static_cast<size_t>(flight.shape.num_experts);
  const auto counts_of = [&](int32_t source) {
    return std::span(flight.counts).subspan(static_cast<size_t>(source) * num_experts, num_experts);
  };
  const size_t bytes = WriteCounts(flight.key, flight.source, counts_of(flight.source),
                                   Whole(flight.counts_message));
  const std::span<const std::byte> message = Whole(flight.counts_message).first(bytes);
  const MessageTag tag{step.step, flight.key.layer, group, MessageKind::kCounts};
  std::vector<SendOp>& sends = flight.sends;
  std::vector<RecvOp>& recvs = flight.recvs;
  sends.clear();
  recvs.clear();
  for (int32_t participant : step.participants) {
    if (participant == communicator_->rank()) continue;
    sends.push_back({participant, tag, message});
    recvs.push_back(
        {participant, tag, Whole(flight.counts_received[static_cast<size_t>(participant)]), 0});
  }
  for (int32_t e = 0; e < ranks_.num_experts; ++e)
    sends.push_back({ranks_.OfExpert(e), tag, message});
  if (absl::Status status = communicator_->Start(group, sends, recvs); !status.ok()) return status;
  if (absl::Status status = Wait(group); !status.ok()) return status;
  for (const RecvOp& recv : recvs) {
    const auto at = std::find(step.participants.begin(), step.participants.end(), recv.peer);
    const int32_t peer_source = static_cast<int32_t>(at - step.participants.begin());
    absl::Status status = ParseCounts(recv.buffer.first(recv.received), flight.key, peer_source,
                                      flight.shape, counts_of(peer_source));
    if (!status.ok()) {
      return absl::InternalError(absl::StrCat("counts of attention rank ", recv.peer, ": ",
                                              std::string(status.message())));
    }
  }
  return CheckTotalCopies(flight.counts, flight.shape);
}

absl::Status MoeExchange::Dispatch(const ExchangeKey& key, std::span<const int32_t> ids,
                                   const Tensor& rows) {
  Flight& flight = flights_[static_cast<size_t>(key.micro_batch)];
  const StepHeader& step = *key.step;
  const auto self =
      std::find(step.participants.begin(), step.participants.end(), communicator_->rank());
  SY_CHECK(self != step.participants.end());
  flight.source = static_cast<int32_t>(self - step.participants.begin());
  flight.key = key;
  const int32_t num_sources = static_cast<int32_t>(step.participants.size());
  const size_t num_experts = static_cast<size_t>(flight.shape.num_experts);
  flight.counts.assign(static_cast<size_t>(num_sources) * num_experts, 0);
  const std::span<int32_t> own =
      std::span(flight.counts)
          .subspan(static_cast<size_t>(flight.source) * num_experts, num_experts);
  CountExperts(ids, own);
  if (num_sources > 1) {
    if (absl::Status status = ExchangeCounts(flight); !status.ok()) return status;
  }
  planner_.BeginGeneration(step.slots_generation);
  planner_.Plan(flight.counts, num_sources, key.layer, &flight.plan);
  const int32_t row_bytes = flight.shape.row_bytes;
  BuildDispatchLists(ids, flight.shape.top_k, flight.plan, flight.source, row_bytes, &flight.lists);

  MessageTag tag{step.step, key.layer, key.micro_batch, MessageKind::kDispatch};
  flight.sends.clear();
  flight.recvs.clear();
  for (int32_t e = 0; e < ranks_.num_experts; ++e) {
    const std::span<std::byte> message = Whole(flight.dispatch_messages[static_cast<size_t>(e)]);
    const size_t bytes =
        WriteDispatch(key, flight.plan, flight.source, e, flight.lists,
                      static_cast<const std::byte*>(rows.data), row_bytes, own, message);
    tag.kind = MessageKind::kDispatch;
    flight.sends.push_back({ranks_.OfExpert(e), tag, message.first(bytes)});
    tag.kind = MessageKind::kCombine;
    const size_t offset =
        static_cast<size_t>(flight.lists.ranks[static_cast<size_t>(e)].combine_row) *
        static_cast<size_t>(row_bytes);
    flight.recvs.push_back(
        {ranks_.OfExpert(e), tag,
         Whole(flight.combined).subspan(offset, CombineBytes(flight.lists, e, row_bytes)), 0});
  }
  return communicator_->Start(key.micro_batch, flight.sends, flight.recvs);
}

absl::Status MoeExchange::Await(int32_t micro_batch) {
  if (absl::Status status = Wait(micro_batch); !status.ok()) return status;
  const Flight& flight = flights_[static_cast<size_t>(micro_batch)];
  for (int32_t e = 0; e < ranks_.num_experts; ++e) {
    const RecvOp& recv = flight.recvs[static_cast<size_t>(e)];
    absl::Status status = CheckCombine(recv.buffer.first(recv.received), flight.key, flight.plan,
                                       flight.source, e, flight.shape.row_bytes);
    if (!status.ok()) {
      return absl::InternalError(
          absl::StrCat("results of expert rank ", e, ": ", std::string(status.message())));
    }
  }
  return absl::OkStatus();
}

Tensor MoeExchange::results(int32_t micro_batch) const {
  const Flight& flight = flights_[static_cast<size_t>(micro_batch)];
  const int64_t hidden = flight.shape.row_bytes / static_cast<int64_t>(DTypeSize(act_));
  return flight.combined.View(act_, {flight.lists.combine_rows, hidden});
}

}  // namespace switchyard
