// Bench offline: prefill and decode speed of one model on this machine, without server or
// scheduler: batches of random, distinct sequences drive a LocalCell step by step. The memory
// bandwidth of a probe in the same process stands beside every figure. Runs on the caller's thread.
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
  uint64_t seed = 0;
  std::function<void(const std::string& line)> log;  // what is being done, for people; may be null
};

struct BenchOfflineRow {
  int batch = 0;
  int prompt_tokens = 0;
  int output_tokens = 0;
  double prefill_tokens_per_second =
      0;  // prompt tokens of all sequences, until the last first token
  double decode_tokens_per_second =
      0;                           // tokens after the first of all sequences; 0 when there are none
  double probe_gb_per_second = 0;  // 1e9 bytes per second, read by all threads
};

struct BenchOfflineReport {
  ModelInfo model;
  std::vector<BenchOfflineRow> rows;
  std::string Text() const;
  std::string Json() const;  // one object: model, dtype, numerics_id, rows
};

absl::StatusOr<BenchOfflineReport> BenchOffline(const BenchOfflineOptions& options);

}  // namespace switchyard
