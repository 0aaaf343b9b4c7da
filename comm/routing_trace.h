// Routing traces: which experts the router chose for every row, in a file of our own. Writer and
// reader stand side by side in routing_trace.cc. All numbers are little-endian:
//
//   header, 40 bytes   u64 magic "SYROUTES", u32 version, u32 num_layers (MoE layers only),
//                      u32 num_experts, u32 top_k, u32 weight_bytes (4: float32, 0: none),
//                      u32 zero, u64 checksum of the 32 bytes before it
//   blocks, each       u32 magic "STEP", u32 num_runs, u32 num_rows, u32 zero,
//                      u64 checksum of the 16 bytes before it and of the payload; the payload:
//     runs             num_runs x { u64 sequence, u32 first position, u32 rows }; their rows, one
//                      after another, are the block's rows
//     ids              [num_layers, num_rows, top_k], a byte each, two with 255 experts or more;
//                      all ones: no expert (the router chose fewer than top_k)
//     weights          [num_layers, num_rows, top_k] float32 in the same order, if weight_bytes
//
// A block is what one attention worker computed in one step: only rows whose pass through all
// layers ended well. A sequence is one choice of one request; its number is unique in the file.
// Positions may be missing (cached prompts are not computed) and may come again (preemption, a
// step that was run again): the last one counts. Checksums are Hash64.
//
// A file that ends inside a block was cut off: it is read up to its last whole block, and the
// reader says how many bytes it left. Anything else that does not fit is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace switchyard {

struct RoutingTraceShape {
  int32_t num_layers = 0;   // MoE layers, at most 4096
  int32_t num_experts = 0;  // at most 65534
  int32_t top_k = 0;        // at most 256
  bool has_weights = true;
  bool operator==(const RoutingTraceShape&) const = default;
};
absl::Status CheckRoutingTraceShape(const RoutingTraceShape& shape);

// Rows of one sequence at consecutive positions.
struct RoutingRun {
  uint64_t sequence = 0;
  int32_t position = 0;
  int32_t count = 0;
};

// One block, as views. A plain value.
struct RoutingStep {
  std::span<const RoutingRun> runs;
  std::span<const int32_t> ids;    // [num_layers, rows, top_k], -1: none
  std::span<const float> weights;  // the same shape; not read without has_weights
};
constexpr int32_t kMaxRoutingStepRows = 1 << 20;

// Writes one file. Used by one thread at a time; a block's bytes are laid out in a buffer that is
// kept, so that steady steps allocate nothing.
class RoutingTraceWriter {
 public:
  // Replaces the file at `path`. Errors: a bad shape, a file that cannot be made.
  static absl::StatusOr<std::unique_ptr<RoutingTraceWriter>> Create(const std::string& path,
                                                                    const RoutingTraceShape& shape);
  ~RoutingTraceWriter();  // closes, without saying whether that went well
  RoutingTraceWriter(const RoutingTraceWriter&) = delete;
  RoutingTraceWriter& operator=(const RoutingTraceWriter&) = delete;

  // The whole block goes to the system at once. REQUIRES: the sizes agree with the shape, at most
  // kMaxRoutingStepRows rows, ids below num_experts.
  absl::Status Append(const RoutingStep& step);
  absl::Status Close();  // idempotent
  int64_t num_bytes() const { return num_bytes_; }

 private:
  RoutingTraceWriter(std::string path, const RoutingTraceShape& shape, int file)
      : path_(std::move(path)), shape_(shape), file_(file) {}
  absl::Status WriteBuffer();

  const std::string path_;
  const RoutingTraceShape shape_;
  int file_;
  int64_t num_bytes_ = 0;
  std::vector<std::byte> buffer_;
};

// A whole trace in memory. A plain value.
struct RoutingTrace {
  static constexpr uint16_t kNoExpert = 0xffff;
  struct Row {
    uint64_t sequence = 0;
    int32_t position = 0;
    bool operator==(const Row&) const = default;
  };

  RoutingTraceShape shape;
  std::vector<Row> rows;         // ascending by sequence, then position; each once
  std::vector<uint16_t> ids;     // [rows, num_layers, top_k]
  std::vector<float> weights;    // the same shape; empty without has_weights
  int64_t num_replaced = 0;      // rows that came again later in the file
  int64_t num_unread_bytes = 0;  // behind the last whole block: the recording was cut off

  size_t row_ids() const {  // of one row
    return static_cast<size_t>(shape.num_layers) * static_cast<size_t>(shape.top_k);
  }
  // The experts of one row in one layer [top_k].
  std::span<const uint16_t> Experts(size_t row, int32_t layer) const {
    const auto top_k = static_cast<size_t>(shape.top_k);
    return std::span(ids).subspan(row * row_ids() + static_cast<size_t>(layer) * top_k, top_k);
  }
  // The first row of every sequence, and rows.size() at the end.
  std::vector<size_t> SequenceBegins() const;
};

// `name` stands in errors, which say what was found, what was expected and where.
absl::StatusOr<RoutingTrace> ParseRoutingTrace(std::span<const std::byte> bytes,
                                               const std::string& name);
absl::StatusOr<RoutingTrace> ReadRoutingTrace(const std::string& path);

// How one layer's copies fall on its experts.
struct RoutingLayerLoad {
  int64_t copies = 0;
  int32_t distinct_experts = 0;  // with a copy
  double max_mean = 0;           // copies of the busiest expert over the mean of all experts
};
std::vector<RoutingLayerLoad> RoutingLayerLoads(const RoutingTrace& trace);

}  // namespace switchyard
