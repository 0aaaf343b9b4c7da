#include "worker/model_config.h"

#include <algorithm>
#include <fstream>
#include <set>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "kernels/check.h"
#include "spdlog/spdlog.h"
#include "worker/config_fields.h"
#include "worker/json_fields.h"
#include "worker/model_families.h"

namespace switchyard {
namespace {

using nlohmann::json;

// Limits far above any real model, low enough that products of any three stay within int64.
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxExperts = 1 << 14;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxTotalExperts = 1 << 20;  // over all layers
constexpr double kMaxParameters = 1e15;
constexpr int64_t kMaxConfigBytes = 16 << 20;
constexpr int kMaxNesting = 64;

void ReadAttention(JsonFields& fields, const ModelFamily& family, ModelConfig* config,
                   ConfigReport* report) {
  AttentionConfig* attention = &config->attention;
  attention->num_heads = fields.RequiredInt("num_attention_heads", 1, 1 << 14);
  const int64_t default_kv =
      family.default_num_kv_heads == 0 ? attention->num_heads : family.default_num_kv_heads;
  attention->num_kv_heads = fields.Int("num_key_value_heads", 1, 1 << 14, default_kv);
  if (attention->num_kv_heads > 0 && attention->num_heads % attention->num_kv_heads != 0) {
    fields.Refuse(
        "num_attention_heads",
        absl::StrCat("= ", attention->num_heads,
                     " is not a multiple of num_key_value_heads = ", attention->num_kv_heads));
  }
  const bool has_head_dim = fields.Has("head_dim");
  if (!has_head_dim && attention->num_heads > 0 &&
      config->hidden_size % attention->num_heads != 0) {
    fields.Refuse("hidden_size", absl::StrCat("= ", config->hidden_size,
                                              " is not a multiple of num_attention_heads = ",
                                              attention->num_heads, " and there is no head_dim"));
  }
  const int64_t derived = attention->num_heads > 0 ? config->hidden_size / attention->num_heads : 0;
  attention->head_dim = fields.Int("head_dim", 1, 4096, derived);
  if (attention->head_dim > 4096)
    fields.Refuse("head_dim", absl::StrCat("= ", attention->head_dim, " exceeds 4096"));
  if (attention->num_heads * attention->head_dim > kMaxWidth) {
    fields.Refuse("num_attention_heads",
                  absl::StrCat("x head_dim = ", attention->num_heads * attention->head_dim,
                               " exceeds ", kMaxWidth));
  }
  attention->qk_norm = family.qk_norm;
  if (!family.qkv_bias_field.empty()) {
    attention->qkv_bias = fields.Bool(std::string(family.qkv_bias_field), family.default_qkv_bias);
    attention->output_bias = attention->qkv_bias && family.output_bias_too;
  } else if (fields.Bool("attention_bias", false)) {
    fields.Refuse("attention_bias", "= true is not implemented for this architecture");
  }
  attention->clip_qkv = static_cast<float>(fields.Number("clip_qkv", 1e-6, 1e6, 0.0));
  ReadRope(fields, family.default_rope_theta, config, report);
}

void ReadWindow(JsonFields& fields, const ModelFamily& family, const ModelConfig& config) {
  const bool on = fields.Bool("use_sliding_window", !family.window_needs_switch);
  const int64_t window = fields.Int("sliding_window", 0, INT64_MAX, 0);
  if (on && window > 0 && window < config.max_position) {
    fields.Refuse("sliding_window",
                  absl::StrCat("= ", window, " is not implemented (max_position_embeddings = ",
                               config.max_position, ")"));
  }
  const json* types = fields.Find("layer_types");
  if (types == nullptr) return;
  bool all_full = types->is_array();
  for (const json& type : *types) all_full = all_full && type == "full_attention";
  const bool covers_all = window == 0 || window >= config.max_position;
  if (!all_full && !(types->is_array() && window > 0 && covers_all)) {
    fields.Refuse("layer_types", absl::StrCat("= ", Shown(*types),
                                              " is not implemented (only full_attention is)"));
  }
}

void ReadMoe(JsonFields& fields, const ModelFamily& family, ModelConfig* config) {
  const std::string count_field = fields.Has("num_experts") ? "num_experts" : "num_local_experts";
  fields.Find("num_local_experts");
  RoutingConfig* routing = &config->moe.routing;
  routing->num_experts = static_cast<int>(fields.RequiredInt(count_field, 1, kMaxExperts));
  routing->top_k = static_cast<int>(fields.RequiredInt("num_experts_per_tok", 1, kMaxExperts));
  if (routing->top_k > routing->num_experts && routing->num_experts > 0) {
    fields.Refuse("num_experts_per_tok", absl::StrCat("= ", routing->top_k, " exceeds ",
                                                      count_field, " = ", routing->num_experts));
  }
  routing->score = RouterScore::kSoftmax;
  routing->softmax_after_topk = family.always_renormalize;
  if (family.always_renormalize) {
    if (!fields.Bool("norm_topk_prob", true)) {
      fields.Refuse("norm_topk_prob", "= false is not implemented for this architecture");
    }
  } else {
    routing->renormalize = fields.Bool("norm_topk_prob", false);
  }
  config->moe.expert_width =
      fields.RequiredInt(std::string(family.expert_width_field), 1, kMaxWidth);
  if (family.has_shared_expert) {
    config->moe.shared_width = fields.RequiredInt("shared_expert_intermediate_size", 1, kMaxWidth);
  } else if (const int64_t width = fields.Int("shared_expert_intermediate_size", 0, INT64_MAX, 0);
             width != 0) {
    fields.Refuse("shared_expert_intermediate_size",
                  absl::StrCat("= ", width, " is not implemented for this architecture"));
  }
}

void ReadLayers(JsonFields& fields, const ModelFamily& family, ModelConfig* config) {
  config->is_moe_layer.assign(static_cast<size_t>(config->num_layers), 1);
  int64_t step = 1;
  std::set<int64_t> dense;
  if (family.has_dense_layers) {
    step = fields.Int("decoder_sparse_step", 1, kMaxLayers, 1);
    for (int64_t layer : fields.IntOrList("mlp_only_layers")) dense.insert(layer);
  }
  bool any_dense = false;
  for (int64_t layer = 0; layer < config->num_layers; ++layer) {
    if ((layer + 1) % step == 0 && !dense.contains(layer)) continue;
    config->is_moe_layer[static_cast<size_t>(layer)] = 0;
    any_dense = true;
  }
  if (!family.has_dense_layers) return;
  config->dense_width = any_dense ? fields.RequiredInt("intermediate_size", 1, kMaxWidth)
                                  : fields.Int("intermediate_size", 0, kMaxWidth, 0);
  if (!any_dense) config->dense_width = 0;
}

// Sizes that each pass alone may still multiply to something no machine holds.
void CheckTotals(JsonFields& fields, const ModelConfig& config) {
  const int64_t experts = config.num_layers * config.moe.routing.num_experts;
  if (experts > kMaxTotalExperts) {
    fields.Refuse("num_hidden_layers",
                  absl::StrCat("x number of experts = ", experts, " exceeds ", kMaxTotalExperts));
  }
  const double expert =
      3.0 * static_cast<double>(config.moe.expert_width) * static_cast<double>(config.hidden_size);
  const double total = expert * static_cast<double>(experts);
  if (total > kMaxParameters) {
    fields.Refuse("num_hidden_layers", absl::StrCat("x experts x their weights = ", total,
                                                    " parameters exceeds ", kMaxParameters));
  }
}

void SetEos(JsonFields& fields, ModelConfig* config, ConfigReport* report) {
  if (!fields.Has("eos_token_id")) return;
  std::vector<int32_t> ids;
  for (int64_t id : fields.IntOrList("eos_token_id")) {
    if (id >= 0 && id < config->vocab_size) {
      if (std::find(ids.begin(), ids.end(), static_cast<int32_t>(id)) == ids.end())
        ids.push_back(static_cast<int32_t>(id));
    } else {
      report->notes.push_back(absl::StrCat("eos_token_id ", id, " is outside the vocabulary of ",
                                           config->vocab_size, " and is ignored"));
    }
  }
  if (!ids.empty()) config->eos_token_ids = std::move(ids);
}

void NoteOutsideVocabulary(const std::string& name, JsonFields& fields, const ModelConfig& config,
                           ConfigReport* report) {
  const json* value = fields.Find(name);
  if (value == nullptr || !value->is_number_integer()) return;
  const bool inside = value->is_number_unsigned() &&
                      value->get<uint64_t>() < static_cast<uint64_t>(config.vocab_size);
  if (!inside) {
    report->notes.push_back(absl::StrCat(name, " ", Shown(*value), " is outside the vocabulary of ",
                                         config.vocab_size, " and is ignored"));
  }
}

void ReadDType(JsonFields& fields, ModelConfig* config) {
  const std::string older = fields.String("torch_dtype", "");
  config->stored_dtype = std::string(absl::StripPrefix(fields.String("dtype", older), "torch."));
  const std::string& name = config->stored_dtype;
  // float16 has no kernels of its own; float32 holds every value of it exactly.
  if (name.empty() || name == "float32" || name == "float16") {
    config->dtype = DType::kF32;
  } else if (name == "bfloat16") {
    config->dtype = DType::kBF16;
  } else {
    fields.Refuse(
        fields.Has("dtype") ? "dtype" : "torch_dtype",
        absl::StrCat("= \"", name, "\" is not supported (float32, bfloat16 and float16 are)"));
  }
}

const ModelFamily* ReadFamily(JsonFields& fields, ModelConfig* config) {
  const json* names = fields.Find("architectures");
  if (names == nullptr || !names->is_array() || names->empty() || !names->front().is_string()) {
    fields.Refuse("architectures", "is missing or not a list of names");
    return nullptr;
  }
  config->architecture = names->front().get<std::string>();
  const ModelFamily* family = FindModelFamily(config->architecture);
  if (family == nullptr) {
    std::vector<std::string> known;
    for (const ModelFamily& f : ModelFamilies()) known.emplace_back(f.architecture);
    fields.Refuse("architectures", absl::StrCat("= ", Shown(names->front()), " is not supported (",
                                                absl::StrJoin(known, ", "), " are)"));
  }
  return family;
}

}  // namespace

int64_t ModelConfig::num_moe_layers() const {
  return std::count(is_moe_layer.begin(), is_moe_layer.end(), 1);
}

ModelConfig ParseModelConfig(std::string_view config_json, ConfigReport* report) {
  ModelConfig config;
  const json object = json::parse(config_json, nullptr, /*allow_exceptions=*/false);
  if (object.is_discarded() || !object.is_object()) {
    report->refusals.push_back("config.json is not a JSON object");
    return config;
  }
  JsonFields fields(object, "", &report->refusals);
  const ModelFamily* family = ReadFamily(fields, &config);
  config.vocab_size = fields.RequiredInt("vocab_size", 1, kMaxVocab);
  config.hidden_size = fields.RequiredInt("hidden_size", 1, kMaxWidth);
  config.num_layers = fields.RequiredInt("num_hidden_layers", 1, kMaxLayers);
  config.max_position = fields.RequiredInt("max_position_embeddings", 1, kMaxPositions);
  config.tie_word_embeddings = fields.Bool("tie_word_embeddings", false);
  ReadDType(fields, &config);
  ReadQuantization(fields, &config.quantization, report);
  RefuseUnimplementedFields(fields);
  if (family == nullptr) return config;
  config.names = {.block = std::string(family->moe_block),
                  .gate = std::string(family->gate),
                  .up = std::string(family->up),
                  .down = std::string(family->down)};
  config.rms_norm_eps =
      static_cast<float>(fields.Number("rms_norm_eps", 0.0, 1.0, family->default_rms_norm_eps));
  const std::string act = fields.String("hidden_act", "silu");
  if (act != "silu" && act != "swish") {
    fields.Refuse("hidden_act",
                  absl::StrCat("= ", Shown(json(act)), " is not implemented (only silu is)"));
  }
  ReadAttention(fields, *family, &config, report);
  ReadWindow(fields, *family, config);
  ReadMoe(fields, *family, &config);
  ReadLayers(fields, *family, &config);
  CheckTotals(fields, config);
  SetEos(fields, &config, report);
  NoteOutsideVocabulary("bos_token_id", fields, config, report);
  NoteOutsideVocabulary("pad_token_id", fields, config, report);

  SkipIrrelevantFields(fields);
  for (const std::string& name : fields.Unknown()) {
    report->notes.push_back(absl::StrCat("unknown config field ", Shown(json(name)), " = ",
                                         Shown(object[name]), " is ignored"));
  }
  return config;
}

void ApplyGenerationConfig(std::string_view generation_json, ModelConfig* config,
                           ConfigReport* report) {
  const json object = json::parse(generation_json, nullptr, /*allow_exceptions=*/false);
  if (object.is_discarded() || !object.is_object()) {
    report->refusals.push_back("generation_config.json is not a JSON object");
    return;
  }
  JsonFields fields(object, "generation_config.", &report->refusals);
  SetEos(fields, config, report);
}

// Levels of brackets in a JSON text. The JSON library writes values by recursion, so deep ones must
// be refused before.
int NestingDepth(std::string_view text) {
  int depth = 0;
  int deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (in_string) {
      if (text[i] == '\\') {
        ++i;  // whatever is escaped
      } else if (text[i] == '"') {
        in_string = false;
      }
    } else if (text[i] == '"') {
      in_string = true;
    } else if (text[i] == '[' || text[i] == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (text[i] == ']' || text[i] == '}') {
      --depth;
    }
  }
  return deepest;
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot open ", path));
  const int64_t size = static_cast<int64_t>(file.tellg());
  // A folder opens but has no size.
  if (size < 0 || size == INT64_MAX)
    return absl::FailedPreconditionError(absl::StrCat("cannot read ", path));
  if (size > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " has ", size, " bytes, more than ", max_bytes));
  }
  std::string text(static_cast<size_t>(size), '\0');
  file.seekg(0);
  if (!file.read(text.data(), size))
    return absl::FailedPreconditionError(absl::StrCat("cannot read ", path));
  if (const int depth = NestingDepth(text); depth > kMaxNesting) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " is nested ", depth, " levels deep, more than ", kMaxNesting));
  }
  return text;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& model_dir) {
  const absl::StatusOr<std::string> text =
      ReadSmallFile(absl::StrCat(model_dir, "/config.json"), kMaxConfigBytes);
  if (!text.ok()) return text.status();
  ConfigReport report;
  ModelConfig config = ParseModelConfig(*text, &report);
  const absl::StatusOr<std::string> generation =
      ReadSmallFile(absl::StrCat(model_dir, "/generation_config.json"), kMaxConfigBytes);
  if (!generation.ok() && !absl::IsNotFound(generation.status())) return generation.status();
  if (generation.ok() && report.refusals.empty())
    ApplyGenerationConfig(*generation, &config, &report);
  if (!report.refusals.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(model_dir, ": ", absl::StrJoin(report.refusals, "; ")));
  }
  for (const std::string& note : report.notes) spdlog::warn("{}: {}", model_dir, note);
  return config;
}

absl::StatusOr<DType> ParseDType(const std::string& name) {
  const std::string bare(absl::StripPrefix(name, "torch."));
  if (bare == "float32") return DType::kF32;
  if (bare == "bfloat16") return DType::kBF16;
  return absl::InvalidArgumentError(
      absl::StrCat("dtype \"", name, "\" is not one of auto, float32, bfloat16"));
}

}  // namespace switchyard
