#include "worker/config_fields.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "absl/strings/str_cat.h"

namespace switchyard {
namespace {

using nlohmann::json;

// Fields that say nothing about the maths of inference.
constexpr std::string_view kIgnoredFields[] = {"_name_or_path",
                                               "architectures",
                                               "attention_dropout",
                                               "auto_map",
                                               "bad_words_ids",
                                               "begin_suppress_tokens",
                                               "bos_token_id",
                                               "chunk_size_feed_forward",
                                               "decoder_start_token_id",
                                               "diversity_penalty",
                                               "do_sample",
                                               "early_stopping",
                                               "encoder_no_repeat_ngram_size",
                                               "exponential_decay_length_penalty",
                                               "finetuning_task",
                                               "forced_bos_token_id",
                                               "forced_eos_token_id",
                                               "id2label",
                                               "initializer_range",
                                               "is_decoder",
                                               "label2id",
                                               "length_penalty",
                                               "max_length",
                                               "max_window_layers",
                                               "min_length",
                                               "model_type",
                                               "no_repeat_ngram_size",
                                               "num_beam_groups",
                                               "num_beams",
                                               "num_return_sequences",
                                               "output_attentions",
                                               "output_hidden_states",
                                               "output_router_logits",
                                               "output_scores",
                                               "pad_token_id",
                                               "prefix",
                                               "pretraining_tp",
                                               "problem_type",
                                               "remove_invalid_values",
                                               "repetition_penalty",
                                               "return_dict",
                                               "return_dict_in_generate",
                                               "router_aux_loss_coef",
                                               "router_jitter_noise",
                                               "sep_token_id",
                                               "suppress_tokens",
                                               "task_specific_params",
                                               "temperature",
                                               "tf_legacy_loss",
                                               "tie_encoder_decoder",
                                               "tokenizer_class",
                                               "top_k",
                                               "top_p",
                                               "torchscript",
                                               "transformers_version",
                                               "typical_p",
                                               "use_bfloat16",
                                               "use_cache"};

// Fields that change the maths and are not implemented, with the values at which they change
// nothing (as JSON).
struct MathsField {
  std::string_view name;
  std::array<std::string_view, 2> harmless;
};
constexpr MathsField kMathsFields[] = {
    {"is_encoder_decoder", {"false", ""}},
    {"add_cross_attention", {"false", ""}},
    {"attn_logit_softcapping", {"0", "0.0"}},
    {"final_logit_softcapping", {"0", "0.0"}},
    {"attention_multiplier", {"", ""}},
    {"residual_multiplier", {"1", "1.0"}},
    {"embedding_multiplier", {"1", "1.0"}},
    {"logits_scaling", {"1", "1.0"}},
    {"query_pre_attn_scalar", {"", ""}},
    {"mlp_bias", {"false", ""}},
    {"scoring_func", {"\"softmax\"", ""}},
    {"topk_method", {"\"greedy\"", ""}},
    {"n_group", {"1", "0"}},
    {"topk_group", {"1", "0"}},
    {"routed_scaling_factor", {"1", "1.0"}},
    {"n_shared_experts", {"0", ""}},
    {"num_shared_experts", {"0", ""}},
    {"first_k_dense_replace", {"0", ""}},
    {"moe_layer_freq", {"1", ""}},
    {"kv_lora_rank", {"", ""}},
    {"q_lora_rank", {"", ""}},
    {"rope_interleave", {"false", ""}},
    {"parallel_attn", {"false", ""}},
    {"alibi", {"false", ""}},
    {"attention_chunk_size", {"", ""}},
    {"attention_sinks", {"false", ""}},
    {"use_parallel_residual", {"false", ""}},
    {"num_nextn_predict_layers", {"0", ""}},
};

}  // namespace

void RefuseUnimplementedFields(JsonFields& fields) {
  for (const MathsField& field : kMathsFields) {
    const json* value = fields.Find(std::string(field.name));
    if (value == nullptr) continue;
    const std::string text = Shown(*value);
    if (std::find(field.harmless.begin(), field.harmless.end(), text) != field.harmless.end())
      continue;
    fields.Refuse(std::string(field.name), absl::StrCat("= ", text, " is not implemented"));
  }
}

void SkipIrrelevantFields(JsonFields& fields) {
  for (std::string_view name : kIgnoredFields) fields.Find(std::string(name));
}

}  // namespace switchyard
