// Bench kernels: the matrix products and the grouped MLP in every weight format beside the
// machine's ceilings and beside oneDNN, all measured in one run and interleaved, so that what other
// programs take of the machine hits all alike. Runs on the caller's thread and a pool of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/ceilings.h"

namespace switchyard {

struct BenchKernelsOptions {
  int threads = 0;  // 0: all cores
  std::string isa = "auto";
  double seconds = 40;  // of measuring, shared out over the rows; preparing comes on top
  // One MoE layer (default: OLMoE-1B-7B's) and matrices [hidden, hidden], enough of them to leave
  // the caches.
  int64_t hidden = 2048, width = 1024, num_experts = 64, top_k = 8, num_matrices = 24;
  size_t probe_bytes = size_t{128} << 20;  // that the probe reads from DRAM between the runs
  std::function<void(int64_t done, int64_t total)> progress = {};  // rows; may be null
};

struct BenchKernelsRow {
  std::string op;      // "matmul", "matmul cached" (one small matrix), "moe layer"
  std::string format;  // WeightFormatName
  int64_t rows = 0;    // tokens
  double us = 0;       // median
  double gflops = 0;
  double gb_per_s = 0;          // of weights
  double probe_gb_per_s = 0;    // DRAM reads between the runs; L2 where the weights are cached
  double share_of_compute = 0;  // of the dot products' ceiling; 0 where none is known
  double share_of_probe = 0;    // median over the rounds
  double onednn_ratio = 0;      // its time / ours, median over the rounds; 0: not compared
  int rounds = 0;
};

struct BenchKernelsReport {
  std::string numerics_id;
  int threads = 0;
  Ceilings ceilings;
  bool onednn_has_bf16 = true;  // else bfloat16 is put beside its float32: twice the bytes
  std::vector<BenchKernelsRow> rows;
  std::string Text() const;
  std::string Json() const;  // one object with `ceilings` and a list `rows`
};

// False, with `error` set, when the CPU lacks the instruction path.
bool BenchKernels(const BenchKernelsOptions& options, BenchKernelsReport* report,
                  std::string* error);

}  // namespace switchyard
