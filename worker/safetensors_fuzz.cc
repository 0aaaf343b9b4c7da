// Any bytes as a *.safetensors file: every tensor of an accepted header lies inside the file.
#include <cstddef>
#include <cstdint>

#include "kernels/check.h"
#include "worker/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  const absl::StatusOr<switchyard::StoredTensors> tensors =
      switchyard::ParseSafetensorsHeader(bytes, size, "input");
  if (!tensors.ok()) return 0;
  for (const auto& [name, tensor] : *tensors) {
    SY_CHECK_LE(tensor.begin, tensor.end);
    SY_CHECK_LE(tensor.end, size);
  }
  return 0;
}
