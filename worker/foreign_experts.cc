#include "worker/foreign_experts.h"

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace switchyard {
namespace {

constexpr size_t kPartsPerMove = 3;  // header, gate and up, down
static_assert(kMaxForeignSlots * kPartsPerMove < Communicator::kMaxPendingSends);

std::span<std::byte> Whole(const Buffer& buffer) { return {buffer.data(), buffer.bytes()}; }

std::array<std::span<std::byte>, kPartsPerMove> PartsOf(ExchangeHeader* header,
                                                        const MlpWeights& weights) {
  return {std::as_writable_bytes(std::span(header, 1)), Whole(weights.gate_up.storage),
          Whole(weights.down.storage)};
}

}  // namespace

ForeignExperts::ForeignExperts(const ForeignExpertsShape& shape,
                               std::shared_ptr<const ExpertWeights> homes, ComputeBackend* backend,
                               Communicator* communicator)
    : shape_(shape), homes_(std::move(homes)), communicator_(communicator) {
  SY_CHECK_LE(shape.slots, kMaxForeignSlots);
  slots_.resize(static_cast<size_t>(shape.num_moe_layers));
  if (shape.slots == 0) return;
  SY_CHECK_EQ(shape.formats.size(), slots_.size());
  for (size_t layer = 0; layer < slots_.size(); ++layer) {
    for (int32_t b = 0; b < shape.slots; ++b) {
      slots_[layer].push_back(backend->MakeMlp(shape.width, shape.hidden, shape.formats[layer]));
    }
  }
  // Every expert fits every slot, and fills it.
  for (size_t layer = 0; layer < slots_.size(); ++layer) {
    for (const auto& home : homes_->experts[layer]) {
      SY_CHECK(home == nullptr ||
               (home->width == shape.width && home->down.format == shape.formats[layer]));
    }
  }
}

absl::StatusOr<bool> ForeignExperts::Start(const ExchangeKey& key, const DispatchPlan& plan) {
  sends_.clear();
  recvs_.clear();
  moves_.clear();
  key_ = &key;
  plan_ = &plan;
  const auto mine = [&](const WeightMove& move) {
    return move.from_rank == shape_.expert_rank || move.to_rank == shape_.expert_rank;
  };
  // The spans below point into it.
  headers_.resize(static_cast<size_t>(std::ranges::count_if(plan.moves, mine)));
  size_t next = 0;
  for (const WeightMove& move : plan.moves) {
    if (!mine(move)) continue;
    ExchangeHeader* header = &headers_[next++];
    const bool send = move.from_rank == shape_.expert_rank;
    const MlpWeights* weights = &Slot(key.layer, move.slot);
    if (send) {
      weights =
          homes_->experts[static_cast<size_t>(key.layer)][static_cast<size_t>(move.expert)].get();
      SY_CHECK(weights != nullptr);
      *header = MakeWeightsHeader(key, plan, move);
    } else {
      moves_.push_back(&move);
    }
    const auto parts = PartsOf(header, *weights);
    for (size_t part = 0; part < kPartsPerMove; ++part) {
      MessageTag tag{key.step->step, key.layer, key.micro_batch, MessageKind::kWeights};
      tag.part = static_cast<uint8_t>(static_cast<size_t>(move.slot) * kPartsPerMove + part);
      if (send) {
        sends_.push_back({shape_.ranks.OfExpert(move.to_rank), tag, parts[part]});
      } else {
        recvs_.push_back({shape_.ranks.OfExpert(move.from_rank), tag, parts[part]});
      }
    }
  }
  if (headers_.empty()) return false;
  if (absl::Status status = communicator_->Start(key.micro_batch, sends_, recvs_); !status.ok())
    return status;
  return true;
}

absl::Status ForeignExperts::Finish() {
  if (absl::Status status = communicator_->Wait(key_->micro_batch, DataDeadline()); !status.ok())
    return status;
  for (size_t m = 0; m < moves_.size(); ++m) {
    const WeightMove& move = *moves_[m];
    const auto failed = [&](const std::string& what) {
      return absl::InternalError(
          absl::StrCat("weights from expert rank ", move.from_rank, ": ", what));
    };
    const std::span<const RecvOp> parts = std::span(recvs_).subspan(m * kPartsPerMove);
    const absl::Status status =
        CheckWeightsHeader(parts[0].buffer.first(parts[0].received), *key_, *plan_, move);
    if (!status.ok()) return failed(std::string(status.message()));
    for (size_t part = 1; part < kPartsPerMove; ++part) {
      if (parts[part].received != parts[part].buffer.size()) {
        return failed(absl::StrCat("expert ", move.expert, " has ", parts[part].received,
                                   " bytes, expected ", parts[part].buffer.size()));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace switchyard
