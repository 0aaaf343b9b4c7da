// Any bytes as config.json and as generation_config.json: refusals and notes, never a crash. A
// config that is accepted must be small enough to count.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "kernels/check.h"
#include "worker/model_config.h"
#include "worker/model_tensors.h"
#include "worker/rope.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  switchyard::ConfigReport report;
  switchyard::ModelConfig config = switchyard::ParseModelConfig(text, &report);
  if (report.refusals.empty()) {
    SY_CHECK_GE(switchyard::CountParameters(config).total,
                switchyard::CountParameters(config).active);
    switchyard::MakeRopeTables(config.attention.rope, 4);
  }
  switchyard::ApplyGenerationConfig(text, &config, &report);
  return 0;
}
