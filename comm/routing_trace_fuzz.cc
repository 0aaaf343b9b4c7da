// Any bytes as a routing trace: what is accepted is in order and within its shape. Wrong checksums
// would end nearly every run at once, so the first input byte says whether they are put right.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "comm/hash64.h"
#include "comm/routing_trace.h"
#include "kernels/check.h"

namespace {

uint64_t Number(const std::vector<std::byte>& file, size_t at) {
  uint32_t value;
  std::memcpy(&value, file.data() + at, 4);
  return value;
}

// The checksum at `at`, of what stands before it from `begin` on and of `payload` bytes behind it.
void PutChecksum(std::vector<std::byte>* file, size_t begin, size_t at, size_t payload) {
  switchyard::Hash64 hash;
  hash.Bytes(std::span(*file).subspan(begin, at - begin));
  hash.Bytes(std::span(*file).subspan(at + 8, payload));
  const uint64_t value = hash.value();
  std::memcpy(file->data() + at, &value, 8);
}

void PutChecksums(std::vector<std::byte>* file) {
  if (file->size() < 40) return;
  PutChecksum(file, 0, 32, 0);
  const uint64_t copies = (Number(*file, 12) % 4097) * (Number(*file, 20) % 257);
  const uint64_t copy_bytes = (Number(*file, 16) < 255 ? 1 : 2) + (Number(*file, 24) != 0 ? 4 : 0);
  for (size_t at = 40; at + 24 <= file->size();) {
    const uint64_t payload =
        Number(*file, at + 4) * 16 + Number(*file, at + 8) * copies * copy_bytes;
    if (payload > file->size() - at - 24) return;
    PutChecksum(file, at, at + 16, payload);
    at += 24 + payload;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const auto input = std::as_bytes(std::span(data, size));
  std::vector<std::byte> file(input.begin() + 1, input.end());
  if (data[0] % 2 == 0) PutChecksums(&file);
  const auto trace = switchyard::ParseRoutingTrace(file, "input");
  if (!trace.ok()) return 0;
  SY_CHECK_EQ(trace->ids.size(), trace->rows.size() * trace->row_ids());
  SY_CHECK_EQ(trace->weights.size(), trace->shape.has_weights ? trace->ids.size() : 0);
  for (size_t i = 1; i < trace->rows.size(); ++i) {
    const auto &a = trace->rows[i - 1], &b = trace->rows[i];
    SY_CHECK(a.sequence < b.sequence || (a.sequence == b.sequence && a.position < b.position));
  }
  for (uint16_t id : trace->ids)
    SY_CHECK(id < trace->shape.num_experts || id == switchyard::RoutingTrace::kNoExpert);
  switchyard::RoutingLayerLoads(*trace);
  return 0;
}
