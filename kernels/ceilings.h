// What this machine can do at most, measured from registers and caches: the limits beside which
// `bench kernels` puts the kernels. Runs on the pool; every figure is the best of several runs.
#pragma once

#include <cstddef>
#include <string>

#include "kernels/thread_pool.h"

namespace switchyard {

struct Ceilings {
  double fma_gflops = 0;       // float32 multiply-adds
  double bf16_dot_gflops = 0;  // vdpbf16ps; 0 where the path has none
  double int8_dot_gflops = 0;  // vpdpbusd, or on avx2 vpmaddwd
  double dram_gb_per_s = 0;    // read, one forward stream per thread
  double l2_gb_per_s = 0;      // read of 256 KiB per thread
};

// Of the instruction path `isa` ("avx512", "avx2"; "portable" has only the memory's figures).
// probe_bytes are read from DRAM: far more than the caches hold.
Ceilings MeasureCeilings(ThreadPool* pool, const std::string& isa, size_t probe_bytes);

}  // namespace switchyard
