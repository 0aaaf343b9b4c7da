// libFuzzer: tokenizer.json, encode, decode. Seeds: testdata/tokenizers/*.json.
#include <cstddef>
#include <cstdint>

#include "server/text/fuzz_entry.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  switchyard::FuzzTokenizer({reinterpret_cast<const char*>(data), size});
  return 0;
}
