#include "server/cli/command.h"

#include <cstdio>
#include <string>

namespace switchyard {

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "switchyard: %s\n", std::string(status.message()).c_str());
  return status.code() == absl::StatusCode::kInvalidArgument ? kUsage : kFailed;
}

}  // namespace switchyard
