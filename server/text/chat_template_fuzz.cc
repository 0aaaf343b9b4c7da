// libFuzzer: template source, parse, render.
#include <cstddef>
#include <cstdint>

#include "server/text/fuzz_entry.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  switchyard::FuzzTemplate({reinterpret_cast<const char*>(data), size});
  return 0;
}
