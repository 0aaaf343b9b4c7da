// quantization_config as its writers document it:
//   fp8: DeepSeek-V3's and Qwen3's config.json; vllm model_executor/layers/quantization/fp8.py
//   mxfp4: openai/gpt-oss's config.json; transformers integrations/mxfp4.py
//   gptq, awq: AutoGPTQ's and AutoAWQ's quantize_config; transformers utils/quantization_config.py
//   compressed-tensors: compressed_tensors/quantization/quant_{config,scheme,args}.py
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "worker/config_fields.h"

namespace switchyard {
namespace {

using nlohmann::json;

constexpr int64_t kMaxGroup = 1 << 20;
constexpr size_t kMaxConfigGroups = 64;

// Which modules stay floats is read from the tensors themselves, so lists of them are skipped.
void SkipModuleLists(JsonFields& fields) {
  for (const char* name : {"modules_to_not_convert", "ignored_layers", "ignore", "lm_head",
                           "modules_in_block_to_quantize"})
    fields.Find(name);
}

void RefuseUnless(JsonFields& fields, const std::string& name, const json& harmless) {
  const json* value = fields.Find(name);
  if (value == nullptr || *value == harmless || (value->is_structured() && value->empty())) return;
  fields.Refuse(name, absl::StrCat("= ", Shown(*value), " is not implemented"));
}

void NoteActivations(JsonFields& fields, const std::string& name, ConfigReport* report) {
  if (const json* value = fields.Find(name); value != nullptr && !value->empty()) {
    report->notes.push_back(absl::StrCat("quantization_config.", name, " = ", Shown(*value),
                                         ": activations are not quantised here"));
  }
}

// -1 and null mean one group over all inputs.
int64_t ReadGroup(JsonFields& fields, const std::string& name) {
  const int64_t group = fields.Int(name, -1, kMaxGroup, -1);
  if (group == 0) fields.Refuse(name, "= 0 is not a group size");
  return group < 0 ? 0 : group;
}

// A pair of block sizes; 0, 0 when absent or bad.
std::pair<int64_t, int64_t> ReadBlock(JsonFields& fields, const std::string& name) {
  const json* value = fields.Find(name);
  if (value == nullptr) return {0, 0};
  std::vector<int64_t> sizes;
  if (value->is_array() && value->size() == 2) sizes = fields.IntOrList(name);
  if (sizes.size() != 2 || sizes[0] < 1 || sizes[1] < 1 || sizes[0] > kMaxGroup ||
      sizes[1] > kMaxGroup) {
    fields.Refuse(name, absl::StrCat("= ", Shown(*value), " is not two block sizes"));
    return {0, 0};
  }
  return {sizes[0], sizes[1]};
}

void ReadFp8(JsonFields& fields, StoredQuantization* out, ConfigReport* report) {
  RefuseUnless(fields, "fmt", "e4m3");
  fields.Find("scale_fmt");  // how the scales were rounded, not how they are stored
  NoteActivations(fields, "activation_scheme", report);
  const auto [rows, cols] = ReadBlock(fields, "weight_block_size");
  out->schemes.push_back({.layout = StoredLayout::kFp8, .block_rows = rows, .block_cols = cols});
  if (rows == 0) out->schemes.push_back({.layout = StoredLayout::kFp8, .block_rows = 1});
}

void ReadGptq(JsonFields& fields, StoredQuantization* out) {
  const int64_t bits = fields.RequiredInt("bits", 1, 32);
  if (bits != 4 && bits != 8)
    fields.Refuse("bits", absl::StrCat("= ", bits, " is not implemented for gptq (4 and 8 are)"));
  const std::string older = fields.Bool("is_marlin_format", false) ? "marlin" : "gptq";
  const std::string format = fields.String("checkpoint_format", older);
  if (format != "gptq" && format != "gptq_v2") {
    fields.Refuse("checkpoint_format", absl::StrCat("= ", Shown(json(format)),
                                                    " is not implemented (gptq and gptq_v2 are)"));
  }
  // Other sizes for some modules; GPTQModel. Modules that are left out start with "-:".
  if (const json* dynamic = fields.Find("dynamic"); dynamic != nullptr && dynamic->is_object()) {
    for (const auto& [pattern, change] : dynamic->items()) {
      if (!pattern.starts_with("-:") && !change.empty())
        fields.Refuse("dynamic",
                      absl::StrCat("with ", Shown(json(pattern)), " is not implemented"));
    }
  }
  fields.Bool("sym", true);  // zero points are stored either way
  out->schemes.push_back({.layout = StoredLayout::kGptq,
                          .bits = static_cast<int>(bits),
                          .block_cols = ReadGroup(fields, "group_size"),
                          .zero_points = true,
                          .act_order = fields.Bool("desc_act", false),
                          .zero_offset = format == "gptq" ? 1 : 0});
}

void ReadAwq(JsonFields& fields, StoredQuantization* out) {
  const std::string bits_name = fields.Has("bits") ? "bits" : "w_bit";
  const int64_t bits = fields.RequiredInt(bits_name, 1, 32);
  if (bits != 4)
    fields.Refuse(bits_name, absl::StrCat("= ", bits, " is not implemented for awq (4 is)"));
  const std::string version = fields.String("version", "gemm");
  if (version != "gemm" && version != "GEMM") {
    fields.Refuse("version", absl::StrCat("= ", Shown(json(version)),
                                          " is not implemented for awq (gemm is)"));
  }
  if (!fields.Bool("zero_point", true))
    fields.Refuse("zero_point", "= false is not implemented for awq");
  out->schemes.push_back(
      {.layout = StoredLayout::kAwq,
       .bits = 4,
       .block_cols = ReadGroup(fields, fields.Has("q_group_size") ? "q_group_size" : "group_size"),
       .zero_points = true});
}

// One entry of config_groups.
void ReadCompressedGroup(JsonFields& group, const json& weights, const std::string& prefix,
                         const std::string& format, StoredQuantization* out, ConfigReport* report,
                         std::vector<std::string>* refusals) {
  JsonFields fields(weights, prefix + "weights.", refusals);
  const int64_t bits = fields.RequiredInt("num_bits", 1, 32);
  const std::string type = fields.String("type", "int");
  const bool symmetric = fields.Bool("symmetric", true);
  const std::string strategy =
      fields.String("strategy", fields.Has("group_size") ? "group" : "tensor");
  const int64_t group_size = ReadGroup(fields, "group_size");
  const std::string order = fields.Has("actorder") && weights["actorder"].is_string()
                                ? weights["actorder"].get<std::string>()
                                : "";
  NoteActivations(group, "input_activations", report);
  StoredScheme scheme{.bits = static_cast<int>(bits), .zero_points = !symmetric};
  if (type == "float" && bits == 8 && symmetric) {
    scheme.layout = StoredLayout::kFp8;
  } else if (type == "float" && bits == 4 && symmetric && group_size == 32 &&
             format == "mxfp4-pack-quantized") {
    scheme.layout = StoredLayout::kMxfp4;
  } else if (type == "int" && (bits == 4 || bits == 8) && format == "pack-quantized") {
    scheme.layout = StoredLayout::kPacked;
  } else if (type == "int" && bits == 8 &&
             (format == "int-quantized" || format == "naive-quantized")) {
    scheme.layout = StoredLayout::kInt8;
  } else {
    fields.Refuse("num_bits", absl::StrCat("= ", bits, " with type ", Shown(json(type)),
                                           symmetric ? "" : ", asymmetric,", " and format ",
                                           Shown(json(format)), " is not implemented"));
    return;
  }
  if (strategy == "group" && group_size > 0) {
    scheme.block_cols = group_size;
    scheme.act_order = order == "group" || order == "dynamic";
  } else if (strategy == "tensor") {
    scheme.block_rows = 0;
  } else if (strategy == "block" && scheme.layout == StoredLayout::kFp8) {
    const auto [rows, cols] = ReadBlock(fields, "block_structure");
    if (rows == 0) fields.Refuse("block_structure", "is missing");
    scheme.block_rows = rows;
    scheme.block_cols = cols;
  } else if (strategy != "channel") {
    fields.Refuse("strategy",
                  absl::StrCat("= ", Shown(json(strategy)), " is not implemented here"));
  }
  out->schemes.push_back(scheme);
}

void ReadCompressedTensors(JsonFields& fields, StoredQuantization* out, ConfigReport* report) {
  const std::string format = fields.String("format", "dense");
  RefuseUnless(fields, "transform_config", json::object());
  if (const json* sparsity = fields.Find("sparsity_config");
      sparsity != nullptr && !sparsity->empty() &&
      !(sparsity->is_object() && sparsity->value("format", json()) == "dense")) {
    fields.Refuse("sparsity_config", absl::StrCat("= ", Shown(*sparsity), " is not implemented"));
  }
  NoteActivations(fields, "kv_cache_scheme", report);
  const json* groups = fields.Find("config_groups");
  if (groups == nullptr || !groups->is_object() || groups->empty() ||
      groups->size() > kMaxConfigGroups) {
    fields.Refuse("config_groups", "is missing, empty or not an object");
    return;
  }
  for (const auto& [name, group] : groups->items()) {
    const std::string prefix =
        absl::StrCat("quantization_config.config_groups.", Shown(json(name)), ".");
    if (!group.is_object()) {
      fields.Refuse("config_groups",
                    absl::StrCat("has ", Shown(json(name)), ", which is no object"));
      continue;
    }
    JsonFields group_fields(group, prefix, &report->refusals);
    const json* weights = group_fields.Find("weights");
    if (weights == nullptr) continue;  // only activations, or nothing
    if (!weights->is_object()) {
      group_fields.Refuse("weights", "is not an object");
      continue;
    }
    ReadCompressedGroup(group_fields, *weights, prefix, group_fields.String("format", format), out,
                        report, &report->refusals);
  }
}

}  // namespace

std::string StoredSchemeText(const std::string& method, const StoredScheme& scheme) {
  const char* kind = scheme.layout == StoredLayout::kFp8     ? " float8"
                     : scheme.layout == StoredLayout::kMxfp4 ? " mxfp4"
                     : scheme.bits == 4                      ? " int4"
                                                             : " int8";
  std::string text = method == "fp8" || method == "mxfp4" ? method : absl::StrCat(method, kind);
  if (scheme.block_rows != 1 && scheme.block_cols != 0) {
    absl::StrAppend(&text, ", blocks of ", scheme.block_rows, " x ", scheme.block_cols);
  } else if (scheme.block_cols != 0) {
    absl::StrAppend(&text, ", groups of ", scheme.block_cols);
  } else {
    absl::StrAppend(&text, ", one scale per ", scheme.block_rows == 1 ? "output" : "matrix");
  }
  if (scheme.zero_points) absl::StrAppend(&text, ", zero points");
  if (scheme.act_order) absl::StrAppend(&text, ", act-order");
  return text;
}

void ReadQuantization(JsonFields& fields, StoredQuantization* quantization, ConfigReport* report) {
  const std::string name =
      fields.Has("quantization_config") ? "quantization_config" : "compression_config";
  fields.Find("compression_config");
  const json* object = fields.Find(name);
  if (object == nullptr || (object->is_object() && object->empty())) return;
  if (!object->is_object()) {
    fields.Refuse(name, absl::StrCat("= ", Shown(*object), " is not an object"));
    return;
  }
  JsonFields own(*object, name + ".", &report->refusals);
  const std::string method = own.String("quant_method", "");
  SkipModuleLists(own);
  quantization->method = method;
  if (method == "fp8") {
    ReadFp8(own, quantization, report);
  } else if (method == "mxfp4") {
    quantization->schemes.push_back({.layout = StoredLayout::kMxfp4, .bits = 4, .block_cols = 32});
  } else if (method == "gptq") {
    ReadGptq(own, quantization);
  } else if (method == "awq") {
    ReadAwq(own, quantization);
  } else if (method == "compressed-tensors") {
    ReadCompressedTensors(own, quantization, report);
  } else {
    own.Refuse(
        "quant_method",
        absl::StrCat("= ", Shown(json(method)),
                     " is not implemented (fp8, mxfp4, gptq, awq and compressed-tensors are)"));
  }
}

}  // namespace switchyard
