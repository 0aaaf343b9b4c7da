// What this CPU and its operating system can run.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/kernel_table.h"

namespace switchyard::cpu {

// The kernel table of "avx512", "avx2" or "portable"; null when this CPU or its system cannot run
// it.
const KernelTable* FindKernelTable(const std::string& name);

}  // namespace switchyard::cpu
