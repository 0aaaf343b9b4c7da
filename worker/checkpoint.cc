#include "worker/checkpoint.h"

#include <cmath>
#include <cstring>
#include <optional>
#include <set>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "kernels/check.h"
#include "nlohmann/json.hpp"
#include "worker/json_fields.h"

namespace switchyard {
namespace {

using nlohmann::json;

constexpr int64_t kMaxIndexBytes = 256 << 20;
constexpr size_t kMaxFiles = 10000;

// Where a tensor's bytes are: a stored tensor, or one slice along its first dimension.
struct Place {
  const SafetensorsFile* file = nullptr;
  const StoredTensor* stored = nullptr;
};

using PlaceMap = std::map<std::string, Place>;

// Names of files in an index must stay inside the folder.
bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name.find('/') == std::string::npos && name != "." && name != "..";
}

// File name -> tensor names that the index promises there.
absl::StatusOr<std::map<std::string, std::set<std::string>>> ReadIndex(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadSmallFile(path, kMaxIndexBytes);
  if (!text.ok()) return text.status();
  const json index = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (index.is_discarded() || !index.is_object() || !index.contains("weight_map") ||
      !index["weight_map"].is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object with a weight_map"));
  }
  std::map<std::string, std::set<std::string>> files;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    if (!file.is_string() || !IsPlainFileName(file.get<std::string>())) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": bad file name ", Shown(file), " for tensor ", Shown(json(tensor))));
    }
    files[file.get<std::string>()].insert(tensor);
  }
  if (files.empty() || files.size() > kMaxFiles) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": names ", files.size(), " files"));
  }
  return files;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// Older checkpoints store what can be computed, and tied ones sometimes the copy.
bool IsIgnorable(const std::string& name, const ModelConfig& config) {
  return absl::EndsWith(name, ".rotary_emb.inv_freq") ||
         (config.tie_word_embeddings && name == "lm_head.weight");
}

// The other name of a tensor in the same spelling of experts: newer saves of Mixtral say "mlp".
std::string OtherBlockName(const std::string& name, const ModelConfig& config) {
  return absl::StrReplaceAll(name, {{absl::StrCat(".", config.names.block, "."), ".mlp."}});
}

// Fused spelling of transformers 5 in memory: experts.gate_up_proj [E, 2 * width, hidden],
// experts.down_proj [E, hidden, width].
struct FusedSlice {
  std::string name;
  std::vector<int64_t> shape;  // of the fused tensor
  int64_t first_row = 0;       // of the slice, in rows of the last dimension
};
FusedSlice FusedPlace(const TensorSpec& spec, const ModelConfig& config, const std::string& block) {
  const int64_t experts = config.moe.routing.num_experts;
  const int64_t width = config.moe.expert_width;
  const int64_t hidden = config.hidden_size;
  const std::string prefix = absl::StrCat("model.layers.", spec.key.layer, ".", block, ".experts.");
  if (spec.key.role == TensorRole::kExpertDown) {
    return {prefix + "down_proj", {experts, hidden, width}, spec.key.expert * hidden};
  }
  const int64_t half = spec.key.role == TensorRole::kExpertUp ? width : 0;
  return {
      prefix + "gate_up_proj", {experts, 2 * width, hidden}, spec.key.expert * 2 * width + half};
}

absl::Status CheckStored(const std::string& name, const StoredTensor& stored,
                         const std::vector<int64_t>& shape) {
  if (stored.dtype == StoredDType::kOther) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " has dtype ",
                                                   Shown(json(stored.dtype_name)),
                                                   "; F32, BF16 and F16 are supported"));
  }
  if (stored.shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " has shape ",
                                                   ShapeText(stored.shape),
                                                   " but the config needs ", ShapeText(shape)));
  }
  return absl::OkStatus();
}

// First few names of a set, for messages.
std::string FewNames(const std::vector<std::string>& names) {
  const size_t shown = std::min<size_t>(names.size(), 5);
  std::string text =
      absl::StrJoin(names.begin(), names.begin() + static_cast<int64_t>(shown), ", ");
  if (names.size() > shown) absl::StrAppend(&text, " and ", names.size() - shown, " more");
  return text;
}

float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -value : value;
  }
  const uint32_t bits = exponent == 31 ? sign | 0x7f800000u | (mantissa << 13)
                                       : sign | ((exponent + 112) << 23) | (mantissa << 13);
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

float ReadElement(const std::byte* data, StoredDType dtype) {
  uint16_t half;
  float value;
  switch (dtype) {
    case StoredDType::kF32:
      std::memcpy(&value, data, 4);
      return value;
    case StoredDType::kBF16:
      std::memcpy(&half, data, 2);
      return ToFloat(bf16{half});
    default:
      std::memcpy(&half, data, 2);
      return HalfToFloat(half);
  }
}

bool SameType(StoredDType stored, DType dtype) {
  return (stored == StoredDType::kF32 && dtype == DType::kF32) ||
         (stored == StoredDType::kBF16 && dtype == DType::kBF16);
}

}  // namespace

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& model_dir,
                                            const ModelConfig& config) {
  Checkpoint checkpoint;
  PlaceMap places;
  const std::string index_path = absl::StrCat(model_dir, "/model.safetensors.index.json");
  std::map<std::string, std::set<std::string>> index;
  absl::StatusOr<std::map<std::string, std::set<std::string>>> read = ReadIndex(index_path);
  if (read.ok()) {
    index = *std::move(read);
  } else if (absl::IsNotFound(read.status())) {
    index["model.safetensors"] = {};
  } else {
    return read.status();
  }
  for (const auto& [file_name, promised] : index) {
    absl::StatusOr<std::unique_ptr<SafetensorsFile>> file =
        SafetensorsFile::Open(absl::StrCat(model_dir, "/", file_name));
    if (!file.ok()) return file.status();
    for (const auto& [name, stored] : (*file)->tensors()) {
      if (!places.emplace(name, Place{file->get(), &stored}).second) {
        return absl::InvalidArgumentError(
            absl::StrCat(model_dir, ": tensor ", name, " is in two files"));
      }
    }
    for (const std::string& name : promised) {
      if (!(*file)->tensors().contains(name)) {
        return absl::InvalidArgumentError(absl::StrCat(model_dir, ": the index puts tensor ", name,
                                                       " into ", file_name,
                                                       ", which does not hold it"));
      }
    }
    checkpoint.files_.push_back(*std::move(file));
  }

  std::set<std::string> used;
  std::vector<std::string> missing;
  const auto find = [&](const std::string& name) {
    const auto it = places.find(name);
    if (it != places.end()) used.insert(name);
    return it == places.end() ? Place{} : it->second;
  };
  for (const TensorSpec& spec : ModelTensors(config)) {
    std::string name = spec.name;
    Place place = find(name);
    if (place.stored == nullptr) place = find(name = OtherBlockName(spec.name, config));
    std::vector<int64_t> shape = spec.shape;
    int64_t first_row = 0;
    for (const std::string& block : {config.names.block, std::string("mlp")}) {
      if (place.stored != nullptr || !IsExpertRole(spec.key.role)) break;
      const FusedSlice fused = FusedPlace(spec, config, block);
      place = find(name = fused.name);
      shape = fused.shape;
      first_row = fused.first_row;
    }
    if (place.stored == nullptr) {
      missing.push_back(spec.name);
      continue;
    }
    if (absl::Status status = CheckStored(name, *place.stored, shape); !status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(model_dir, ": ", std::string(status.message())));
    }
    const size_t element = StoredDTypeSize(place.stored->dtype);
    const size_t begin = static_cast<size_t>(first_row * spec.shape.back()) * element;
    checkpoint.entries_[spec.key] = {
        .file = place.file,
        .dtype = place.stored->dtype,
        .bytes = place.file->Data(*place.stored)
                     .subspan(begin, static_cast<size_t>(spec.numel()) * element),
        .shape = spec.shape};
  }
  if (!missing.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(model_dir, ": missing tensors: ", FewNames(missing)));
  }
  std::vector<std::string> left_over;
  for (const auto& [name, place] : places) {
    if (!used.contains(name) && !IsIgnorable(name, config)) left_over.push_back(name);
  }
  if (!left_over.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        model_dir, ": tensors that the config does not explain: ", FewNames(left_over)));
  }
  return checkpoint;
}

const Checkpoint::Entry& Checkpoint::Find(const TensorKey& key) const {
  const auto it = entries_.find(key);
  SY_CHECK(it != entries_.end());
  return it->second;
}

Checkpoint::Loaded Checkpoint::Load(const TensorKey& key, DType dtype) const {
  const Entry& entry = Find(key);
  Loaded loaded;
  loaded.file = entry.file;
  loaded.source = entry.bytes;
  loaded.view.dtype = dtype;
  loaded.view.ndim = static_cast<int>(entry.shape.size());
  for (size_t i = 0; i < entry.shape.size(); ++i) loaded.view.shape[i] = entry.shape[i];

  const bool aligned = reinterpret_cast<uintptr_t>(entry.bytes.data()) % DTypeSize(dtype) == 0;
  if (SameType(entry.dtype, dtype) && aligned) {
    loaded.view.data =
        const_cast<std::byte*>(entry.bytes.data());  // read-only mapping; views are never written
    return loaded;
  }
  loaded.owned = Buffer(loaded.view.bytes());
  loaded.view.data = loaded.owned.data();
  if (SameType(entry.dtype, dtype)) {
    std::memcpy(loaded.view.data, entry.bytes.data(), entry.bytes.size());
    return loaded;
  }
  const size_t step = StoredDTypeSize(entry.dtype);
  const int64_t n = loaded.view.numel();
  for (int64_t i = 0; i < n; ++i) {
    const float value =
        ReadElement(entry.bytes.data() + static_cast<size_t>(i) * step, entry.dtype);
    if (dtype == DType::kF32) {
      loaded.view.as<float>()[i] = value;
    } else {
      loaded.view.as<bf16>()[i] = ToBF16(value);
    }
  }
  return loaded;
}

int64_t Checkpoint::StoredBytes(const TensorKey& key) const {
  return static_cast<int64_t>(Find(key).bytes.size());
}

std::span<const std::byte> Checkpoint::StoredData(const TensorKey& key) const {
  return Find(key).bytes;
}

StoredDType Checkpoint::stored_dtype(const TensorKey& key) const { return Find(key).dtype; }

}  // namespace switchyard
