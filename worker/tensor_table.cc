#include "worker/tensor_table.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"
#include "worker/json_fields.h"
#include "worker/model_config.h"

namespace switchyard {
namespace {

using nlohmann::json;

constexpr int64_t kMaxIndexBytes = 256 << 20;
constexpr size_t kMaxFiles = 10000;

// File name -> tensor names that the index promises there.
using Index = std::map<std::string, std::set<std::string>>;

// Names of files in an index must stay inside the folder.
bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name.find('/') == std::string::npos && name != "." && name != "..";
}

absl::StatusOr<Index> ReadIndex(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadSmallFile(path, kMaxIndexBytes);
  if (!text.ok()) return text.status();
  const json index = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (index.is_discarded() || !index.is_object() || !index.contains("weight_map") ||
      !index["weight_map"].is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object with a weight_map"));
  }
  Index files;
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

}  // namespace

absl::StatusOr<TensorTable> TensorTable::Open(const std::string& model_dir) {
  absl::StatusOr<Index> index = ReadIndex(absl::StrCat(model_dir, "/model.safetensors.index.json"));
  if (absl::IsNotFound(index.status())) index = Index{{"model.safetensors", {}}};
  if (!index.ok()) return index.status();
  TensorTable table;
  for (const auto& [file_name, promised] : *index) {
    absl::StatusOr<std::unique_ptr<SafetensorsFile>> file =
        SafetensorsFile::Open(absl::StrCat(model_dir, "/", file_name));
    if (!file.ok()) return file.status();
    for (const auto& [name, stored] : (*file)->tensors()) {
      if (!table.places_.emplace(name, std::pair(file->get(), &stored)).second) {
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
    table.files_.push_back(*std::move(file));
  }
  return table;
}

StoredPart TensorTable::Find(const std::string& name) {
  const auto it = places_.find(name);
  if (it == places_.end()) return {};
  used_.insert(name);
  const auto [file, stored] = it->second;
  return {file, stored->dtype, stored->dtype_name, stored->shape, file->Data(*stored)};
}

std::vector<std::string> TensorTable::Unused() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : places_) {
    if (!used_.contains(name)) names.push_back(name);
  }
  return names;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

}  // namespace switchyard
