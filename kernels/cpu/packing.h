// Weight matrices into panels (kernel_table.h says how they lie). The same bytes for every
// instruction path.
#pragma once

#include <span>

#include "kernels/backend.h"
#include "kernels/thread_pool.h"

namespace switchyard::cpu {

// One packed matrix whose columns come from `sources` [n, k], interleaved panel by panel: panel i
// of every source in turn. With one source: its panels in order. REQUIRES: equal shapes and types.
PackedMatrix PackPanels(ThreadPool* pool, std::span<const Tensor> sources);

// Room for PackPanels of `num_sources` matrices [n, k].
PackedMatrix MakePanels(int64_t n, int64_t k, DType dtype, int64_t num_sources);

}  // namespace switchyard::cpu
