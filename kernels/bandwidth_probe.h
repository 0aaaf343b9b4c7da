// A probe of the memory bandwidth that all threads of a pool reach together, for benchmarks to
// print beside their figures.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"
#include "kernels/thread_pool.h"

namespace switchyard {

// Reads 64-bit words in one forward stream with prefetch, as fast as one thread can read memory.
// Returns their sum. REQUIRES: bytes is a multiple of 64.
uint64_t SumWords(const std::byte* data, size_t bytes);

// Keeps its buffer, so that samples may be taken between the runs of a benchmark: what other users
// of the machine leave of the bandwidth changes by the minute. Used by one thread; each call
// blocks.
class BandwidthProbe {
 public:
  // A buffer of `bytes`, filled with random data; choose it far larger than the caches. The pool
  // must outlive the probe.
  BandwidthProbe(ThreadPool* pool, size_t bytes);
  // Reads the buffer once and returns GB/s (1e9 bytes per second).
  double Sample();

 private:
  ThreadPool* const pool_;
  const size_t num_chunks_;
  Buffer buffer_;
};

// The median of `repetitions` samples after one to warm up.
double ProbeReadBandwidth(ThreadPool* pool, size_t bytes, int repetitions);

}  // namespace switchyard
