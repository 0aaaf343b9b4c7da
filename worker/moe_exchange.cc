#include "worker/moe_exchange.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

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
  if (step.micro_batches != 1) {
    return absl::UnimplementedError(
        absl::StrCat("step ", step.step, " has ", step.micro_batches, " micro-batches"));
  }
  return absl::OkStatus();
}

MoeExchange::MoeExchange(const ExchangeShape& shape, DType act, const CellRanks& ranks,
                         std::shared_ptr<const ExpertPlacement> placement,
                         const PlannerOptions& planner, Communicator* communicator)
    : shape_(shape),
      act_(act),
      ranks_(ranks),
      communicator_(communicator),
      planner_(std::move(placement), planner),
      counts_message_(MaxCountsBytes(shape)),
      combined_(static_cast<size_t>(MaxCombineRows(shape, ranks.num_experts)) *
                static_cast<size_t>(shape.row_bytes)) {
  for (int32_t i = 0; i < ranks.num_attention; ++i)
    counts_received_.emplace_back(MaxCountsBytes(shape));
  for (int32_t i = 0; i < ranks.num_experts; ++i)
    dispatch_messages_.emplace_back(MaxDispatchBytes(shape));
}

int64_t MoeExchange::BufferBytes(const ExchangeShape& shape, const CellRanks& ranks) {
  return MaxCombineRows(shape, ranks.num_experts) * shape.row_bytes +
         ranks.num_experts * static_cast<int64_t>(MaxDispatchBytes(shape)) +
         (ranks.num_attention + 1) * static_cast<int64_t>(MaxCountsBytes(shape));
}

absl::Status MoeExchange::ExchangeCounts(const StepHeader& step, int32_t source) {
  const size_t num_experts = static_cast<size_t>(shape_.num_experts);
  const std::span<int32_t> own =
      std::span(counts_).subspan(static_cast<size_t>(source) * num_experts, num_experts);
  const size_t bytes = WriteCounts(key_, source, own, Whole(counts_message_));
  const MessageTag tag{step.step, key_.layer, key_.micro_batch, MessageKind::kCounts};
  sends_.clear();
  recvs_.clear();
  for (int32_t participant : step.participants) {
    if (participant == communicator_->rank()) continue;
    sends_.push_back({participant, tag, Whole(counts_message_).first(bytes)});
    recvs_.push_back(
        {participant, tag, Whole(counts_received_[static_cast<size_t>(participant)]), 0});
  }
  for (int32_t e = 0; e < ranks_.num_experts; ++e) {
    sends_.push_back({ranks_.OfExpert(e), tag, Whole(counts_message_).first(bytes)});
  }
  if (absl::Status status = communicator_->Start(sends_, recvs_); !status.ok()) return status;
  if (absl::Status status = communicator_->Wait(DataDeadline()); !status.ok()) return status;
  for (const RecvOp& recv : recvs_) {
    const auto at = std::find(step.participants.begin(), step.participants.end(), recv.peer);
    const int32_t peer_source = static_cast<int32_t>(at - step.participants.begin());
    const std::span<int32_t> into =
        std::span(counts_).subspan(static_cast<size_t>(peer_source) * num_experts, num_experts);
    absl::Status status =
        ParseCounts(recv.buffer.first(recv.received), key_, peer_source, shape_, into);
    if (!status.ok()) {
      return absl::InternalError(absl::StrCat("counts of attention rank ", recv.peer, ": ",
                                              std::string(status.message())));
    }
  }
  return absl::OkStatus();
}

absl::Status MoeExchange::Dispatch(const StepHeader& step, int32_t moe_layer,
                                   std::span<const int32_t> ids, const Tensor& rows) {
  const auto self =
      std::find(step.participants.begin(), step.participants.end(), communicator_->rank());
  SY_CHECK(self != step.participants.end());
  source_ = static_cast<int32_t>(self - step.participants.begin());
  key_ = {.step = &step, .layer = moe_layer, .micro_batch = 0};
  const int32_t num_sources = static_cast<int32_t>(step.participants.size());
  const size_t num_experts = static_cast<size_t>(shape_.num_experts);
  counts_.assign(static_cast<size_t>(num_sources) * num_experts, 0);
  const std::span<int32_t> own =
      std::span(counts_).subspan(static_cast<size_t>(source_) * num_experts, num_experts);
  CountExperts(ids, own);
  if (num_sources > 1) {
    if (absl::Status status = ExchangeCounts(step, source_); !status.ok()) return status;
    if (absl::Status status = CheckTotalCopies(counts_, shape_); !status.ok()) return status;
  }
  planner_.BeginGeneration(step.slots_generation);
  planner_.Plan(counts_, num_sources, moe_layer, &plan_);
  BuildDispatchLists(ids, shape_.top_k, plan_, source_, shape_.row_bytes, &lists_);

  MessageTag tag{step.step, moe_layer, 0, MessageKind::kDispatch};
  sends_.clear();
  recvs_.clear();
  for (int32_t e = 0; e < ranks_.num_experts; ++e) {
    const std::span<std::byte> message = Whole(dispatch_messages_[static_cast<size_t>(e)]);
    const size_t bytes =
        WriteDispatch(key_, plan_, source_, e, lists_, static_cast<const std::byte*>(rows.data),
                      shape_.row_bytes, own, message);
    tag.kind = MessageKind::kDispatch;
    sends_.push_back({ranks_.OfExpert(e), tag, message.first(bytes)});
    tag.kind = MessageKind::kCombine;
    const size_t offset = static_cast<size_t>(lists_.ranks[static_cast<size_t>(e)].combine_row) *
                          static_cast<size_t>(shape_.row_bytes);
    recvs_.push_back({ranks_.OfExpert(e), tag,
                      Whole(combined_).subspan(offset, CombineBytes(lists_, e, shape_.row_bytes)),
                      0});
  }
  return communicator_->Start(sends_, recvs_);
}

absl::Status MoeExchange::Await() {
  if (absl::Status status = communicator_->Wait(DataDeadline()); !status.ok()) return status;
  for (int32_t e = 0; e < ranks_.num_experts; ++e) {
    const RecvOp& recv = recvs_[static_cast<size_t>(e)];
    absl::Status status =
        CheckCombine(recv.buffer.first(recv.received), key_, plan_, source_, e, shape_.row_bytes);
    if (!status.ok()) {
      return absl::InternalError(
          absl::StrCat("results of expert rank ", e, ": ", std::string(status.message())));
    }
  }
  return absl::OkStatus();
}

Tensor MoeExchange::results() const {
  const int64_t hidden = shape_.row_bytes / static_cast<int64_t>(DTypeSize(act_));
  return combined_.View(act_, {lists_.combine_rows, hidden});
}

}  // namespace switchyard
