// Checkpoint: the tensors of a model folder by what they are for. Opening maps the files and checks
// that every tensor of the config is there with its shape and that none is left over; nothing is
// read until Load. Owned by whoever loads; const methods may be called from any thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/tensor.h"
#include "worker/model_config.h"
#include "worker/model_tensors.h"
#include "worker/safetensors.h"

namespace switchyard {

class Checkpoint {
 public:
  Checkpoint() = default;  // holds nothing
  // Reads DIR/model.safetensors.index.json and its files, or DIR/model.safetensors.
  static absl::StatusOr<Checkpoint> Open(const std::string& model_dir, const ModelConfig& config);

  // A tensor converted to `dtype`, row-major. `view` points into `owned`, or straight into the
  // mapped file when nothing has to be converted.
  struct Loaded {
    Tensor view;
    Buffer owned;
    const SafetensorsFile* file = nullptr;
    std::span<const std::byte> source;
    // Call when the bytes have been copied elsewhere; `view` must not be used afterwards.
    void Release() { file->Release(source); }
  };
  Loaded Load(const TensorKey& key, DType dtype) const;
  // Bytes of the tensor in the file, for progress.
  int64_t StoredBytes(const TensorKey& key) const;
  // The bytes themselves, as they are in the file.
  std::span<const std::byte> StoredData(const TensorKey& key) const;
  StoredDType stored_dtype(const TensorKey& key) const;

 private:
  struct Entry {
    const SafetensorsFile* file = nullptr;
    StoredDType dtype = StoredDType::kF32;
    std::span<const std::byte> bytes;
    std::vector<int64_t> shape;
  };
  const Entry& Find(const TensorKey& key) const;

  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<TensorKey, Entry> entries_;
};

}  // namespace switchyard
