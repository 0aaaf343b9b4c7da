// RoutingRecorder: the tap of `switchyard trace`: what the router chose for every row that the
// attention workers of a process compute, written to a routing trace (comm/routing_trace.h) by a
// thread of its own. An attention worker takes a record at the beginning of a step, each layer
// copies its choices into it, and Commit hands it to the writer; a step that fails is discarded.
// All records are allocated at construction: no allocation and no string per row or step.
//
// The queue is bounded by the number of records. When the disk is too slow and none is free, a step
// goes unrecorded and its rows are counted, so that serving never waits for the disk; or, with
// `wait_when_full`, the worker waits, so that nothing is missing. After a write error the rest is
// counted as dropped; serving goes on.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/routing_trace.h"
#include "kernels/mutex.h"
#include "proto/step_plan.h"

namespace switchyard {

// One step of one attention worker, on its way to the file. Owned by the recorder; used by the
// worker from Begin to Commit or Discard, then by the writer.
class RoutingRecord {
 public:
  RoutingRecord(const RoutingTraceShape& shape, int32_t max_rows);
  static int64_t Bytes(const RoutingTraceShape& shape, int32_t max_rows);

  // What the router chose in MoE layer `layer`: [rows, top_k] each. Once per layer.
  void SetLayer(int32_t layer, std::span<const int32_t> ids, std::span<const float> weights);

 private:
  friend class RoutingRecorder;
  void SetRows(std::span<const SequenceWork> work);
  RoutingStep step() const;

  const RoutingTraceShape shape_;
  std::vector<RoutingRun> runs_;  // capacity max_rows
  size_t num_rows_ = 0;
  std::vector<int32_t> ids_;  // [num_layers, max_rows, top_k]; in use: [num_layers, num_rows_, …]
  std::vector<float> weights_;  // the same
};

struct RoutingRecorderOptions {
  std::string path;             // "": nothing is recorded
  bool has_weights = true;      // the router's weights beside the ids
  bool wait_when_full = false;  // else steps are dropped
};

class RoutingRecorder {
 public:
  struct Totals {
    int64_t steps = 0;  // blocks in the file
    int64_t rows = 0;
    int64_t bytes = 0;         // of the file
    int64_t dropped_rows = 0;  // computed, but not in the file
  };

  // Makes the file and starts the thread. Errors: those of the file and of the shape.
  static absl::StatusOr<std::unique_ptr<RoutingRecorder>> Create(
      const RoutingRecorderOptions& options, RoutingTraceShape shape, int32_t max_rows,
      int32_t num_workers);
  ~RoutingRecorder();  // as Close

  // Of all its records.
  static int64_t BufferBytes(const RoutingTraceShape& shape, int32_t max_rows, int32_t num_workers);

  // Any thread. Null: this step is not recorded. REQUIRES: at most max_rows rows, at least one; one
  // record per worker at a time, given back by Commit or Discard.
  RoutingRecord* Begin(std::span<const SequenceWork> work);
  void Commit(RoutingRecord* record);
  void Discard(RoutingRecord* record);

  // Writes what was committed and closes the file. The first error of the file, if there was one.
  // Idempotent; one thread. Steps that begin or end later are dropped.
  absl::Status Close();
  Totals totals() const;  // any thread

 private:
  RoutingRecorder(std::unique_ptr<RoutingTraceWriter> file, const RoutingTraceShape& shape,
                  int32_t max_rows, int32_t num_records, bool wait_when_full);
  void Write();

  // Constant after construction.
  const bool wait_when_full_;
  std::vector<std::unique_ptr<RoutingRecord>> records_;

  const std::unique_ptr<RoutingTraceWriter> file_;  // writer's thread; after it the closing one

  mutable Mutex mu_;
  CondVar changed_;
  std::vector<RoutingRecord*> free_ SY_GUARDED_BY(mu_);
  std::vector<RoutingRecord*> queue_ SY_GUARDED_BY(mu_);  // in order
  bool closing_ SY_GUARDED_BY(mu_) = false;
  absl::Status status_ SY_GUARDED_BY(mu_);  // the first error
  Totals totals_ SY_GUARDED_BY(mu_);

  std::thread writer_;  // last: it uses the members above
};

}  // namespace switchyard
