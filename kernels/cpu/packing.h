// Weight matrices into panels (kernel_table.h says how they lie). The same bytes for every
// instruction path. A matrix may have several sources [n, k] whose columns are interleaved panel by
// panel: panel i of every source in turn.
#pragma once

#include <span>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/thread_pool.h"

namespace switchyard::cpu {

// REQUIRES: equal shapes and types; kF32 and kBF16: that type. Quantises for the other formats.
PackedMatrix PackPanels(const KernelTable& kernels, ThreadPool* pool,
                        std::span<const Tensor> sources, const WeightFormat& format);
// REQUIRES: equal shapes and formats.
PackedMatrix PackPanels(ThreadPool* pool, std::span<const QuantizedTensor> sources);

// Room for PackPanels of `num_sources` matrices [n, k].
PackedMatrix MakePanels(int64_t n, int64_t k, const WeightFormat& format, int64_t num_sources);

}  // namespace switchyard::cpu
