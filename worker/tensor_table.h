// TensorTable: the tensors of all *.safetensors files of a model folder by name, mapped and checked
// against the index. It remembers which names were asked for, so that left-over ones can be told.
// Built and read on one thread while a Checkpoint opens.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/safetensors.h"

namespace switchyard {

// A stored tensor, or a slice of one along its first dimensions. The bytes stay mapped as long as
// the file lives; there are exactly as many as dtype and shape need (unless kOther).
struct StoredPart {
  const SafetensorsFile* file = nullptr;
  StoredDType dtype = StoredDType::kOther;
  std::string dtype_name;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;

  bool empty() const { return file == nullptr; }
};

class TensorTable {
 public:
  // Reads DIR/model.safetensors.index.json and its files, or DIR/model.safetensors.
  static absl::StatusOr<TensorTable> Open(const std::string& model_dir);

  // Empty when there is no such tensor; otherwise the name counts as used.
  StoredPart Find(const std::string& name);
  // Names that were not found yet, ascending.
  std::vector<std::string> Unused() const;

  // The files, for whoever keeps parts of them. The table is of no use afterwards.
  std::vector<std::unique_ptr<SafetensorsFile>> TakeFiles() { return std::move(files_); }

 private:
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, std::pair<const SafetensorsFile*, const StoredTensor*>> places_;
  std::set<std::string> used_;
};

// "[2, 3]", for messages.
std::string ShapeText(const std::vector<int64_t>& shape);

}  // namespace switchyard
