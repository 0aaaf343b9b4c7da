#include "worker/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "kernels/check.h"
#include "nlohmann/json.hpp"
#include "worker/json_fields.h"
#include "worker/stored_elements.h"

namespace switchyard {
namespace {

// The other name of a tensor in the same spelling of experts: newer saves of Mixtral say "mlp".
std::string OtherBlockName(const std::string& name, const ModelConfig& config) {
  return absl::StrReplaceAll(name, {{absl::StrCat(".", config.names.block, "."), ".mlp."}});
}

// Where a tensor is in the fused spelling of transformers 5: experts.gate_up_proj [experts, 2 *
// width, hidden], experts.down_proj [experts, hidden, width].
FusedRows FusedPlace(const TensorSpec& spec, const ModelConfig& config, const std::string& block) {
  const int64_t width = config.moe.expert_width;
  const std::string prefix = absl::StrCat("model.layers.", spec.key.layer, ".", block, ".experts.");
  FusedRows place{.experts = config.moe.routing.num_experts, .expert = spec.key.expert};
  if (spec.key.role == TensorRole::kExpertDown) {
    place.name = prefix + "down_proj";
    place.rows = config.hidden_size;
  } else {
    place.name = prefix + "gate_up_proj";
    place.rows = 2 * width;
    place.row = spec.key.role == TensorRole::kExpertUp ? width : 0;
  }
  return place;
}

absl::Status CheckFloats(const std::string& name, const StoredPart& part,
                         const std::vector<int64_t>& shape) {
  if (!IsPlainFloat(part.dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " has dtype ", Shown(nlohmann::json(part.dtype_name)),
                     "; F32, BF16 and F16 are supported where quantization_config does not say "
                     "otherwise"));
  }
  if (part.shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " has shape ",
                                                   ShapeText(part.shape), " but the config needs ",
                                                   ShapeText(shape)));
  }
  return absl::OkStatus();
}

// First few names of a list, for messages.
std::string FewNames(const std::vector<std::string>& names) {
  const size_t shown = std::min<size_t>(names.size(), 5);
  std::string text =
      absl::StrJoin(names.begin(), names.begin() + static_cast<int64_t>(shown), ", ");
  if (names.size() > shown) absl::StrAppend(&text, " and ", names.size() - shown, " more");
  return text;
}

bool IsZero(const StoredPart& part) {
  return std::all_of(part.bytes.begin(), part.bytes.end(),
                     [](std::byte b) { return b == std::byte{0}; });
}

// Finds the tensors of a config one by one.
class Matcher {
 public:
  Matcher(const ModelConfig& config, TensorTable* table) : config_(config), table_(table) {}

  // Exactly one of the results is set, or none when the tensor is missing.
  absl::Status Find(const TensorSpec& spec, StoredPart* part, std::optional<StoredMatrix>* matrix) {
    for (const std::string& name : {spec.name, OtherBlockName(spec.name, config_)}) {
      if (absl::Status status = FindNamed(name, spec, part, matrix); !status.ok()) return status;
      if (!part->empty() || matrix->has_value()) return absl::OkStatus();
    }
    if (!IsExpertRole(spec.key.role)) return absl::OkStatus();
    for (const std::string& block : {config_.names.block, std::string("mlp")}) {
      const FusedRows place = FusedPlace(spec, config_, block);
      if (absl::Status status = FindFused(place, spec, part, matrix); !status.ok()) return status;
      if (!part->empty() || matrix->has_value()) return absl::OkStatus();
    }
    return absl::OkStatus();
  }

  // Older checkpoints store what can be computed, tied ones sometimes the copy; quantised ones keep
  // scales of activations and, from some writers, biases of zero.
  bool IsIgnorable(const std::string& name) {
    if (absl::EndsWith(name, ".rotary_emb.inv_freq")) return true;
    if (config_.tie_word_embeddings && absl::StartsWith(name, "lm_head.")) return true;
    if (config_.quantization.empty()) return false;
    for (const char* suffix : {".input_scale", ".output_scale", ".k_scale", ".v_scale",
                               ".input_zero_point", ".input_global_scale"}) {
      if (absl::EndsWith(name, suffix)) return true;
    }
    return absl::EndsWith(name, ".bias") && IsZero(table_->Find(name));
  }

 private:
  absl::Status FindNamed(const std::string& name, const TensorSpec& spec, StoredPart* part,
                         std::optional<StoredMatrix>* matrix) {
    StoredPart found = table_->Find(name);
    const std::string module(absl::StripSuffix(name, ".weight"));
    if ((found.empty() || !IsPlainFloat(found.dtype)) && spec.shape.size() == 2 &&
        spec.key.role != TensorRole::kEmbedding) {
      absl::StatusOr<std::optional<StoredMatrix>> stored =
          FindStoredMatrix(module, spec.shape[0], spec.shape[1], config_.quantization,
                           [&](const std::string& part_name) { return table_->Find(part_name); });
      if (!stored.ok()) return stored.status();
      if (stored->has_value()) {
        *matrix = *std::move(stored);
        return absl::OkStatus();
      }
    }
    if (found.empty()) return absl::OkStatus();
    *part = std::move(found);
    return CheckFloats(name, *part, spec.shape);
  }

  absl::Status FindFused(const FusedRows& place, const TensorSpec& spec, StoredPart* part,
                         std::optional<StoredMatrix>* matrix) {
    StoredPart found = table_->Find(place.name);
    if (found.empty()) {
      if (config_.quantization.method != "mxfp4") return absl::OkStatus();
      absl::StatusOr<std::optional<StoredMatrix>> stored =
          FindFusedMxfp4(place, spec.shape[0], spec.shape[1],
                         [&](const std::string& part_name) { return table_->Find(part_name); });
      if (!stored.ok()) return stored.status();
      *matrix = *std::move(stored);
      return absl::OkStatus();
    }
    if (absl::Status status =
            CheckFloats(place.name, found, {place.experts, place.rows, spec.shape[1]});
        !status.ok()) {
      return status;
    }
    const size_t row_bytes = static_cast<size_t>(spec.shape[1]) * StoredDTypeSize(found.dtype);
    found.bytes =
        found.bytes.subspan(static_cast<size_t>(place.expert * place.rows + place.row) * row_bytes,
                            static_cast<size_t>(spec.shape[0]) * row_bytes);
    *part = std::move(found);
    return absl::OkStatus();
  }

  const ModelConfig& config_;
  TensorTable* const table_;
};

bool SameType(StoredDType stored, DType dtype) {
  return (stored == StoredDType::kF32 && dtype == DType::kF32) ||
         (stored == StoredDType::kBF16 && dtype == DType::kBF16);
}

void Convert(const StoredPart& part, const Tensor& out) {
  const int64_t n = out.numel();
  for (int64_t i = 0; i < n; ++i) {
    const float value = FloatElement(part.bytes.data(), part.dtype, i);
    if (out.dtype == DType::kF32) {
      out.as<float>()[i] = value;
    } else {
      out.as<bf16>()[i] = ToBF16(value);
    }
  }
}

}  // namespace

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& model_dir,
                                            const ModelConfig& config) {
  const auto bad = [&](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(model_dir, ": ", what));
  };
  absl::StatusOr<TensorTable> table = TensorTable::Open(model_dir);
  if (!table.ok()) return table.status();
  Checkpoint checkpoint;
  Matcher matcher(config, &*table);
  std::vector<std::string> missing;
  for (const TensorSpec& spec : ModelTensors(config)) {
    StoredPart part;
    std::optional<StoredMatrix> matrix;
    if (absl::Status status = matcher.Find(spec, &part, &matrix); !status.ok())
      return bad(std::string(status.message()));
    if (part.empty() && !matrix.has_value()) {
      missing.push_back(spec.name);
      continue;
    }
    checkpoint.entries_[spec.key] = {.part = std::move(part), .shape = spec.shape};
    if (matrix.has_value()) checkpoint.quantized_[spec.key] = *std::move(matrix);
  }
  if (!missing.empty()) return bad(absl::StrCat("missing tensors: ", FewNames(missing)));
  std::vector<std::string> left_over;
  for (const std::string& name : table->Unused()) {
    if (!matcher.IsIgnorable(name)) left_over.push_back(name);
  }
  if (!left_over.empty())
    return bad(absl::StrCat("tensors that the config does not explain: ", FewNames(left_over)));
  checkpoint.files_ = table->TakeFiles();
  return checkpoint;
}

const Checkpoint::Entry& Checkpoint::Find(const TensorKey& key) const {
  const auto it = entries_.find(key);
  SY_CHECK(it != entries_.end());
  return it->second;
}

const StoredMatrix* Checkpoint::Quantized(const TensorKey& key) const {
  const auto it = quantized_.find(key);
  return it == quantized_.end() ? nullptr : &it->second;
}

std::vector<StoredPart> Checkpoint::Parts(const TensorKey& key) const {
  const StoredMatrix* matrix = Quantized(key);
  if (matrix == nullptr) return {Find(key).part};
  std::vector<StoredPart> parts = {matrix->codes, matrix->scales};
  for (const StoredPart* part : {&matrix->zeros, &matrix->input_group}) {
    if (!part->empty()) parts.push_back(*part);
  }
  return parts;
}

Checkpoint::Loaded Checkpoint::Load(const TensorKey& key, DType dtype) const {
  const Entry& entry = Find(key);
  Loaded loaded;
  loaded.source = Parts(key);
  loaded.view.dtype = dtype;
  loaded.view.ndim = static_cast<int>(entry.shape.size());
  for (size_t i = 0; i < entry.shape.size(); ++i) loaded.view.shape[i] = entry.shape[i];

  const StoredMatrix* matrix = Quantized(key);
  const std::span<const std::byte> bytes = entry.part.bytes;
  const bool same = matrix == nullptr && SameType(entry.part.dtype, dtype);
  if (same && reinterpret_cast<uintptr_t>(bytes.data()) % DTypeSize(dtype) == 0) {
    loaded.view.data =
        const_cast<std::byte*>(bytes.data());  // read-only mapping; views are never written
    return loaded;
  }
  loaded.owned = Buffer(loaded.view.bytes());
  loaded.view.data = loaded.owned.data();
  if (matrix != nullptr) {
    Dequantize(*matrix, dtype, loaded.view.data);
  } else if (same) {
    std::memcpy(loaded.view.data, bytes.data(), bytes.size());
  } else {
    Convert(entry.part, loaded.view);
  }
  return loaded;
}

int64_t Checkpoint::StoredBytes(const TensorKey& key) const {
  const StoredMatrix* matrix = Quantized(key);
  return matrix != nullptr ? matrix->stored_bytes()
                           : static_cast<int64_t>(Find(key).part.bytes.size());
}

}  // namespace switchyard
