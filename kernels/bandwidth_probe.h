// A probe of the memory bandwidth that all threads of a pool reach together, for benchmarks to
// print beside their figures.
#pragma once

#include <cstddef>

#include "kernels/thread_pool.h"

namespace switchyard {

// Reads a buffer of `bytes` (filled with random data; choose it far larger than the caches)
// `repetitions` times after one warm-up and returns the median GB/s (1e9 bytes per second). Blocks
// its caller.
double ProbeReadBandwidth(ThreadPool* pool, size_t bytes, int repetitions);

}  // namespace switchyard
