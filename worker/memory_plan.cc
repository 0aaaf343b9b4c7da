#include "worker/memory_plan.h"

#include "absl/strings/str_cat.h"
#include "comm/plan_costs.h"
#include "worker/decoder.h"
#include "worker/expert_worker.h"
#include "worker/weight_memory.h"

namespace switchyard {

ExchangeShape MakeExchangeShape(const OpenedModel& model, int32_t max_rows) {
  return {.row_bytes = static_cast<int32_t>(model.config.hidden_size *
                                            static_cast<int64_t>(DTypeSize(model.dtype))),
          .num_experts = model.info.num_experts,
          .top_k = model.info.top_k,
          .max_rows = max_rows};
}

absl::Status CheckForeignSlots(const OpenedModel& model, int32_t foreign_slots) {
  for (int32_t i = 0; foreign_slots > 0 && i < model.info.num_moe_layers; ++i) {
    const int32_t layer = LayerOfMoe(model.config, i);
    if (model.formats.OfExperts(model.config, layer).has_value()) continue;
    return absl::InvalidArgumentError(absl::StrCat("the experts of layer ", layer,
                                                   " have several weight formats, so they cannot "
                                                   "share the ",
                                                   foreign_slots, " foreign slots of a layer"));
  }
  return absl::OkStatus();
}

std::vector<WeightFormat> SlotFormats(const OpenedModel& model) {
  std::vector<WeightFormat> formats;
  for (int32_t i = 0; i < model.info.num_moe_layers; ++i) {
    formats.push_back(model.formats.Of({TensorRole::kExpertDown, LayerOfMoe(model.config, i), 0}));
  }
  return formats;
}

absl::StatusOr<int64_t> MemoryLeft(const OpenedModel& model, const MemoryUse& use,
                                   const ComputeBackend& backend, int64_t available_bytes) {
  if (int64_t{use.max_rows} * model.info.top_k > kMaxStepCopies) {
    return absl::InvalidArgumentError(absl::StrCat("max_num_batched_tokens ", use.max_rows,
                                                   " x top ", model.info.top_k, " experts exceeds ",
                                                   kMaxStepCopies));
  }
  const ExchangeShape shape = MakeExchangeShape(model, use.max_rows);
  int64_t weights = use.expert_weights_bytes;
  if (use.attention_workers > 0) {  // they share them
    weights += AttentionWeightBytes(model.config, model.formats, model.dtype, backend) +
               RopeTableBytes(model.config, model.info.max_model_len);
  }
  const ScratchBytes attention = backend.MaxScratch(
      Decoder::MaxCalls(model.config, model.dtype, use.max_rows, model.info.max_model_len));
  const ScratchBytes expert = backend.MaxScratch(ExpertRank::MaxCalls(
      shape, model.dtype, model.config.hidden_size, model.config.moe.expert_width));
  const int64_t num_threads = use.threads + use.attention_workers + use.expert_workers;
  const int64_t num_ranks = use.attention_workers + use.expert_workers;
  const int64_t num_peers = int64_t{use.ranks.num_attention} + use.ranks.num_experts - 1;
  const int64_t buffers =
      use.recorder_bytes + num_ranks * num_peers * use.eager_bytes +
      use.attention_workers * (Decoder::WorkspaceBytes(model.config, model.dtype, use.max_rows) +
                               MoeExchange::BufferBytes(shape, use.ranks) + attention.backend) +
      use.expert_workers * (ExpertRank::BufferBytes(shape, use.ranks) + expert.backend) +
      num_threads * (use.attention_workers > 0 ? attention.per_thread : expert.per_thread);
  const int64_t sum = weights + use.kv_bytes + buffers;
  if (sum > available_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "weights of ", weights, " bytes, a KV cache of ", use.kv_bytes, " bytes and buffers of ",
        buffers, " bytes (for ", use.max_rows, " rows a step, ", use.ranks.num_attention,
        " attention and ", use.ranks.num_experts, " expert workers) take ", sum, " bytes, but ",
        available_bytes, " bytes of memory are available"));
  }
  return available_bytes - sum;
}

}  // namespace switchyard
