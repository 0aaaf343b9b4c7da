// Recorded routing as a planner's workload: one layer of a trace (routing_trace.h), its rows put
// together to steps as a server would, over and over until the benchmark ends:
// - decode: every step has one row of each of `tokens` sequences. They begin at staggered positions
//   and each goes on to its next one; where a sequence ends, the next of the trace takes its place.
//   Fewer sequences make smaller steps.
// - prefill: every step has the next `tokens` rows, sequence after sequence. Fewer rows make
//   smaller steps.
// A sequence belongs to one source (attention worker): its index modulo their number; in decode the
// index is that of its place in the step. Deterministic. One thread per object.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "comm/routing_trace.h"

namespace switchyard {

enum class ReplayOrder : uint8_t { kDecode, kPrefill };

class RecordedWorkload {
 public:
  struct Spec {
    const RoutingTrace* trace = nullptr;  // with rows; outlives the workload
    int32_t layer = 0;
    ReplayOrder order = ReplayOrder::kDecode;
    int32_t num_sources = 1;
    int32_t tokens = 64;  // per step at most
  };
  explicit RecordedWorkload(const Spec& spec);

  int32_t tokens() const { return tokens_; }  // of every step
  // The next step's counts [num_sources, num_experts].
  std::span<const int32_t> Next();

 private:
  void AddRow(size_t row, size_t source);
  void NextDecode();
  void NextPrefill();

  const Spec spec_;
  const std::vector<size_t> begins_;  // of the sequences, and the end
  int32_t tokens_ = 0;
  struct Place {
    size_t sequence = 0;
    size_t row = 0;
  };
  std::vector<Place> places_;  // decode: [tokens]
  size_t next_sequence_ = 0;   // decode: takes the next place that is free
  Place next_;                 // prefill
  std::vector<int32_t> counts_;
};

// The layers that a benchmark looks at: the most skewed and the median one by max/mean of their
// experts' copies, ties to the lower; one when there are not two.
std::vector<int32_t> LayersToReplay(const RoutingTrace& trace);

}  // namespace switchyard
