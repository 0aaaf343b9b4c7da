// Bench offline: prefill and decode speed of one model on this machine, without server or
// scheduler: batches of random, distinct sequences drive a LocalCell step by step. The memory
// bandwidth of a probe in the same process, sampled between the repetitions, stands beside every
// figure. Runs on the caller's thread.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/local_cell.h"

namespace switchyard {

struct BenchOfflineOptions {
  CellOptions cell;  // max_model_len 0: prompt_tokens + output_tokens
  int prompt_tokens = 512;
  int output_tokens = 64;
  std::vector<int> batches = {1};
  int repetitions = 3;  // of every batch, each with tokens of its own; the medians are reported
  // > 0: every repetition runs a second time while so many other threads of this process do nothing
  // but compute; what is left of the speed is reported.
  int busy_threads = 0;
  uint64_t seed = 0;
  std::function<void(const std::string& line)> log;  // what is being done, for people; may be null
};

// Medians over the repetitions; of decoding, over the steps of all of them.
struct BenchOfflineRow {
  int batch = 0;
  int prompt_tokens = 0;
  int output_tokens = 0;
  // Prompt tokens of all sequences, until the last first token.
  double prefill_tokens_per_second = 0;
  // Tokens after the first of all sequences, by the median step; 0 when there are none, like all
  // that concerns decoding.
  double decode_tokens_per_second = 0;
  double probe_gb_per_second = 0;    // 1e9 bytes per second, read by all threads
  double decode_bytes_per_step = 0;  // BatchRun::bytes_read, mean over the steps
  double decode_share_of_bound = 0;  // those bytes / the median step's seconds / the probe
  double prefill_gflops = 0;         // BatchRun::flops, 1e9 per second
  // Tokens per second beside busy threads over those without; 0: not measured.
  double busy_prefill_ratio = 0;
  double busy_decode_ratio = 0;
};

struct BenchOfflineReport {
  ModelInfo model;
  std::vector<BenchOfflineRow> rows;
  std::string Text() const;
  std::string Json() const;  // one object: model, dtype, numerics_id, rows
};

absl::StatusOr<BenchOfflineReport> BenchOffline(const BenchOfflineOptions& options);

}  // namespace switchyard
