// SafetensorsFile: one mapped *.safetensors file and the bounds-checked table of its tensors.
// Format: u64 little-endian header length, that many bytes of JSON {name: {dtype, shape,
// data_offsets}}, then the data. Owned by the Checkpoint; read by any thread. Never trusts a number
// of the file: whatever is wrong ends in a Status that names file, tensor and both numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace switchyard {

enum class StoredDType : uint8_t {
  kF32,
  kBF16,
  kF16,
  kF8E4M3,
  kF8E8M0,
  kI8,
  kU8,
  kI32,
  kI64,
  kOther
};
size_t StoredDTypeSize(StoredDType dtype);  // REQUIRES: not kOther
// F32, BF16 and F16: what an unquantised tensor may be.
bool IsPlainFloat(StoredDType dtype);

struct StoredTensor {
  StoredDType dtype = StoredDType::kOther;
  std::string dtype_name;  // as in the file
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // byte range in the file; element type and shape are known to fill it
                       // exactly (unless kOther)
  uint64_t end = 0;
};

using StoredTensors = std::map<std::string, StoredTensor>;

// Parses the header of a file of `file_size` bytes whose first bytes are `head` (the length field
// and the whole JSON, as far as the file has them). `name` stands in messages.
absl::StatusOr<StoredTensors> ParseSafetensorsHeader(std::span<const std::byte> head,
                                                     uint64_t file_size, const std::string& name);

class SafetensorsFile {
 public:
  // kNotFound when it cannot be opened, kInvalidArgument when it is not a valid file.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const StoredTensors& tensors() const { return tensors_; }
  std::span<const std::byte> Data(const StoredTensor& tensor) const {
    return {data_ + tensor.begin, static_cast<size_t>(tensor.end - tensor.begin)};
  }
  // Tells the kernel that these bytes are not needed again soon, so that the process does not count
  // them as resident.
  void Release(std::span<const std::byte> bytes) const;

 private:
  SafetensorsFile(const std::byte* data, uint64_t size) : data_(data), size_(size) {}

  const std::byte* const data_;
  const uint64_t size_;
  StoredTensors tensors_;  // constant after Open
};

}  // namespace switchyard
