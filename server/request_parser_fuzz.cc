// libFuzzer: the first byte chooses the endpoint, the rest is the body.
#include <cstddef>
#include <cstdint>
#include <string>

#include "server/request_parser.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string body(reinterpret_cast<const char*>(data + 1), size - 1);
  switch (data[0] % 4) {
    case 0:
      (void)switchyard::ParseCompletionRequest(body).ok();
      break;
    case 1:
      (void)switchyard::ParseChatRequest(body).ok();
      break;
    case 2:
      (void)switchyard::ParseTokenizeRequest(body).ok();
      break;
    default:
      (void)switchyard::ParseDetokenizeRequest(body).ok();
  }
  return 0;
}
