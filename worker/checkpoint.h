// Checkpoint: the tensors of a model folder by what they are for. Opening maps the files and checks
// that every tensor of the config is there with its shape and that none is left over; no weights
// are read until Load. Matrices that are stored quantised become floats when they are loaded. Owned
// by whoever loads; const methods may be called from any thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/tensor.h"
#include "worker/model_config.h"
#include "worker/model_tensors.h"
#include "worker/safetensors.h"
#include "worker/stored_matrix.h"
#include "worker/tensor_table.h"

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
    std::vector<StoredPart> source;  // what it was made of
    // Call when the bytes have been copied elsewhere; `view` must not be used afterwards.
    void Release() {
      for (const StoredPart& part : source) part.file->Release(part.bytes);
    }
  };
  // `dtype`: float32 or bfloat16. REQUIRES: a tensor of the config.
  Loaded Load(const TensorKey& key, DType dtype) const;
  // Bytes of the tensor in the file, for progress.
  int64_t StoredBytes(const TensorKey& key) const;
  // The stored tensors that it is made of, as they are in the files.
  std::vector<StoredPart> Parts(const TensorKey& key) const;
  // Null when it is stored as floats.
  const StoredMatrix* Quantized(const TensorKey& key) const;
  // Matrices that are stored quantised.
  int64_t num_quantized() const { return static_cast<int64_t>(quantized_.size()); }

 private:
  struct Entry {
    StoredPart part;  // empty when it is one of quantized_
    std::vector<int64_t> shape;
  };
  const Entry& Find(const TensorKey& key) const;

  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<TensorKey, Entry> entries_;
  std::map<TensorKey, StoredMatrix> quantized_;
};

}  // namespace switchyard
