#include "comm/communicator.h"

#include "absl/strings/str_cat.h"

namespace switchyard {

std::string TagName(const MessageTag& tag) {
  static constexpr const char* kKinds[] = {"counts", "dispatch", "combine", "weights"};
  return absl::StrCat("step ", tag.step, " layer ", tag.layer, " micro-batch ", tag.micro_batch,
                      " ", kKinds[static_cast<size_t>(tag.kind)],
                      tag.part > 0 ? absl::StrCat(" part ", tag.part) : std::string());
}

}  // namespace switchyard
