#include "server/cli/memory_policy.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <climits>

namespace switchyard {

void InterleaveMemory() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) != 0 ||
      CPU_COUNT(&cores) < sysconf(_SC_NPROCESSORS_ONLN))
    return;
  constexpr unsigned long kMaxNodes = 1024;
  std::array<unsigned long, kMaxNodes / (CHAR_BIT * sizeof(unsigned long))> nodes{};
  int mode = MPOL_DEFAULT;
  if (syscall(SYS_get_mempolicy, &mode, nullptr, 0, nullptr, 0) != 0 || mode != MPOL_DEFAULT)
    return;
  if (syscall(SYS_get_mempolicy, nullptr, nodes.data(), kMaxNodes, nullptr, MPOL_F_MEMS_ALLOWED) !=
      0)
    return;
  int count = 0;
  for (const unsigned long word : nodes) count += std::popcount(word);
  if (count > 1) (void)syscall(SYS_set_mempolicy, MPOL_INTERLEAVE, nodes.data(), kMaxNodes);
}

}  // namespace switchyard
