// MicroBatchPolicy: how many micro-batches a step gets. One is the specification; two overlap the
// attention side's work with the experts' but read all weights twice, so that only measuring tells
// whether they pay. A function of the steps that it was told of, without a clock: owned by the
// SchedulerCore, on its thread.
//
// Steps are told apart by their size (powers of two of the rows of the fullest participant). A size
// begins with one. While workers wait for a worthwhile part of its steps, it is tried out now and
// then: a few steps in one and in two, taking turns. Two are taken when the medians say that they
// save at least 5 %, and three quarters of the pairs say so too, and kept while they save 2 % and
// win most pairs. Trials that change nothing become rarer, down to 32 steps in 4096.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace switchyard {

// The names are those of --micro-batches.
enum class MicroBatchMode : uint8_t { kAuto, kOne, kTwo };

// A step that all its workers have answered.
struct MicroBatchSample {
  int32_t rows = 0;  // of the fullest participant
  uint32_t micro_batches = 1;
  int64_t step_ns = 0;    // of the slowest worker; 0: not measured
  double wait_share = 0;  // of the workers' time in the step, 0 … 1
};

class MicroBatchPolicy {
 public:
  static constexpr int32_t kTrialSteps = 16;   // of each kind in a trial
  static constexpr int32_t kFirstPause = 64;   // steps before a size's first trial
  static constexpr int32_t kLastPause = 4096;  // between two that changed nothing, at most

  explicit MicroBatchPolicy(MicroBatchMode mode) : mode_(mode) {}

  // For the next step, 1 or 2; a single row goes in one. REQUIRES: rows >= 1.
  uint32_t Choose(int32_t rows);
  void Observe(const MicroBatchSample& sample);
  // A step that was aborted or lost: ends the trial of its size, which falls back to one and is
  // tried again later and later. So a cell that cannot do steps in two gets on.
  void Fail(const MicroBatchSample& sample);

 private:
  struct Size {
    uint32_t chosen = 1;
    std::array<int32_t, 2> pause = {kFirstPause, kFirstPause};  // while one, two are chosen
    int32_t steps_left = kFirstPause;                           // until the next trial
    double hidden_share = 0;  // of steps in one: what two could hide at best; lately
    // Of the trial under way.
    bool trial = false;
    uint32_t planned = 0;
    std::array<std::vector<int64_t>, 2> step_ns;  // in one, in two
  };
  static void EndTrial(Size* size);
  static void Rest(Size* size, int32_t pause);
  Size& SizeOf(int32_t rows);

  const MicroBatchMode mode_;
  std::array<Size, 32> sizes_;
};

}  // namespace switchyard
