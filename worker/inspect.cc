#include "worker/inspect.h"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/backend.h"
#include "kernels/thread_pool.h"
#include "nlohmann/json.hpp"
#include "worker/checkpoint.h"
#include "worker/kv_cache.h"
#include "worker/model_config.h"
#include "worker/model_tensors.h"
#include "worker/weight_memory.h"

namespace switchyard {
namespace {

using nlohmann::ordered_json;

constexpr int64_t kMaxConfigBytes = 16 << 20;
constexpr double kMaxCountedParameters =
    1e15;  // beyond, int64 arithmetic is not safe and the figures say nothing

const char* RopeName(RopeType type) {
  switch (type) {
    case RopeType::kDefault:
      return "default";
    case RopeType::kLinear:
      return "linear";
    case RopeType::kDynamicNtk:
      return "dynamic";
    case RopeType::kYarn:
      return "yarn";
    case RopeType::kLlama3:
      return "llama3";
  }
  return "";
}

// A refused config may lack what the sizes need.
bool SizesAreKnown(const ModelConfig& config) {
  const bool present = config.hidden_size > 0 && config.vocab_size > 0 && config.num_layers > 0 &&
                       config.is_moe_layer.size() == static_cast<size_t>(config.num_layers) &&
                       config.attention.num_heads > 0 && config.attention.num_kv_heads > 0 &&
                       config.attention.head_dim > 0 && config.moe.expert_width > 0;
  if (!present) return false;
  return static_cast<double>(config.num_layers) * config.moe.routing.num_experts *
             static_cast<double>(config.moe.expert_width) * 3.0 *
             static_cast<double>(config.hidden_size) <
         kMaxCountedParameters;
}

ordered_json Facts(const ModelConfig& config, const WeightFormats& formats, DType dtype) {
  const ParameterCounts counts = CountParameters(config);
  const int64_t moe_layers = config.num_moe_layers();
  ThreadPool pool(1);
  std::string error;
  const std::unique_ptr<ComputeBackend> backend = MakeCpuBackend(&pool, "auto", &error);
  const int64_t expert_bytes = LargestExpertBytes(config, formats, *backend);
  ordered_json facts;
  facts["dtype"] = DTypeName(dtype);
  facts["quantization"] = formats.name().empty() ? "none" : formats.name();
  facts["vocab_size"] = config.vocab_size;
  facts["hidden_size"] = config.hidden_size;
  facts["num_layers"] = config.num_layers;
  facts["num_moe_layers"] = moe_layers;
  facts["num_attention_heads"] = config.attention.num_heads;
  facts["num_key_value_heads"] = config.attention.num_kv_heads;
  facts["head_dim"] = config.attention.head_dim;
  facts["rope"] = RopeName(config.attention.rope.type);
  facts["num_experts"] = config.moe.routing.num_experts;
  facts["top_k"] = config.moe.routing.top_k;
  facts["expert_width"] = config.moe.expert_width;
  facts["shared_expert_width"] = config.moe.shared_width;
  facts["dense_width"] = config.dense_width;
  facts["max_position_embeddings"] = config.max_position;
  facts["eos_token_ids"] = config.eos_token_ids;
  facts["parameters_total"] = counts.total;
  facts["parameters_active"] = counts.active;
  facts["attention_worker_bytes"] = AttentionWeightBytes(config, formats, dtype, *backend);
  facts["expert_bytes"] = expert_bytes;
  facts["expert_bytes_per_layer"] = config.moe.routing.num_experts * expert_bytes;
  facts["all_experts_bytes"] = AllExpertsBytes(config, formats, *backend);
  facts["kv_bytes_per_token"] = KvBytesPerBlock(config, dtype, *backend) / kKvBlockSize;
  return facts;
}

std::string Bytes(const ordered_json& value) {
  const double bytes = value.get<double>();
  if (bytes >= 1 << 30) return absl::StrFormat("%.2f GiB", bytes / (1 << 30));
  if (bytes >= 1 << 20) return absl::StrFormat("%.2f MiB", bytes / (1 << 20));
  return absl::StrFormat("%.2f KiB", bytes / (1 << 10));
}

std::string Count(const ordered_json& value) {
  const double count = value.get<double>();
  if (count >= 1e9) return absl::StrFormat("%.2f B", count / 1e9);
  if (count >= 1e6) return absl::StrFormat("%.2f M", count / 1e6);
  return absl::StrFormat("%.0f", count);
}

std::string Text(const ordered_json& report) {
  std::string text;
  const auto line = [&](const std::string& name, const std::string& value) {
    absl::StrAppend(&text, absl::StrFormat("%-18s %s\n", name, value));
  };
  const auto number = [&](const char* name) { return report[name].dump(); };
  line("model", report["model"].get<std::string>());
  line("architecture", report["architecture"].get<std::string>());
  if (report.contains("hidden_size")) {
    line("dtype", absl::StrCat(report["dtype"].get<std::string>(), ", quantization ",
                               report["quantization"].get<std::string>()));
    line("layers", absl::StrCat(number("num_layers"), ", ", number("num_moe_layers"),
                                " with experts; hidden ", number("hidden_size"), ", vocabulary ",
                                number("vocab_size")));
    line("attention", absl::StrCat(number("num_attention_heads"), " heads, ",
                                   number("num_key_value_heads"), " key-value heads of ",
                                   number("head_dim"), "; RoPE ", report["rope"].get<std::string>(),
                                   ", ", number("max_position_embeddings"), " positions"));
    line("experts",
         absl::StrCat(
             number("num_experts"), " of width ", number("expert_width"), ", top ", number("top_k"),
             report["shared_expert_width"] == 0
                 ? ""
                 : absl::StrCat("; shared expert of width ", number("shared_expert_width"))));
    line("parameters", absl::StrCat(Count(report["parameters_total"]), " in total, ",
                                    Count(report["parameters_active"]), " active per token"));
    line("attention worker", absl::StrCat(Bytes(report["attention_worker_bytes"]),
                                          " of weights in each, and KV cache"));
    line("expert workers",
         absl::StrCat(Bytes(report["all_experts_bytes"]), " of weights over all; ",
                      Bytes(report["expert_bytes"]), " per expert and layer at most"));
    if (report.contains("stored_quantization")) {
      std::vector<std::string> schemes = report["stored_quantization"];
      line("stored as",
           absl::StrCat(absl::StrJoin(schemes, "; or "), "; ",
                        report.value("kept_as_stored", 0) > 0
                            ? "its codes are kept where the formats agree, the rest is "
                            : "",
                        "dequantised when loaded"));
    }
    line("KV cache", absl::StrCat(number("kv_bytes_per_token"), " bytes per token"));
  }
  for (const auto& note : report["notes"]) line("note", note.get<std::string>());
  for (const auto& refusal : report["unsupported"]) line("UNSUPPORTED", refusal.get<std::string>());
  line("supported", report["supported"].get<bool>() ? "yes" : "no");
  return text;
}

}  // namespace

absl::StatusOr<InspectReport> Inspect(const InspectOptions& options) {
  const std::string& dir = options.model_dir;
  const absl::StatusOr<std::string> text = ReadSmallFile(dir + "/config.json", kMaxConfigBytes);
  if (!text.ok()) return text.status();
  ConfigReport found;
  ModelConfig config = ParseModelConfig(*text, &found);
  if (const auto generation = ReadSmallFile(dir + "/generation_config.json", kMaxConfigBytes);
      generation.ok()) {
    ApplyGenerationConfig(*generation, &config, &found);
  }
  DType dtype = config.dtype;
  if (options.dtype != "auto") {
    const absl::StatusOr<DType> parsed = ParseDType(options.dtype);
    if (!parsed.ok()) return parsed.status();
    dtype = *parsed;
  }
  ordered_json report;
  report["model"] = dir;
  report["architecture"] = config.architecture;
  std::optional<WeightFormats> formats;
  if (SizesAreKnown(config)) {
    absl::StatusOr<WeightFormats> made = WeightFormats::Create(options.formats, config, dtype);
    if (!made.ok()) return made.status();
    formats = *std::move(made);
    report.update(Facts(config, *formats, dtype));
  }
  for (const StoredScheme& scheme : config.quantization.schemes)
    report["stored_quantization"].push_back(StoredSchemeText(config.quantization.method, scheme));
  if (found.refusals.empty()) {
    const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(dir, config);
    if (!checkpoint.ok()) {
      found.refusals.emplace_back(checkpoint.status().message());
    } else {
      report["stored_quantized_matrices"] = checkpoint->num_quantized();
      if (formats.has_value()) {
        formats->KeepStored(*checkpoint, config);
        report["kept_as_stored"] = formats->num_kept();
        report.update(Facts(config, *formats, dtype));
      }
    }
  }
  report["supported"] = found.refusals.empty();
  report["unsupported"] = found.refusals;
  report["notes"] = found.notes;
  return InspectReport{.supported = found.refusals.empty(),
                       .text = Text(report),
                       .json = report.dump(1, ' ', false, ordered_json::error_handler_t::replace)};
}

}  // namespace switchyard
