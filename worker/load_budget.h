// LoadBudget: how much of a background load may happen beside the steps of its worker: so many
// bytes per step, so that loading takes a bounded part of each. Nothing is held back while the
// worker is idle. A plain value without clocks or threads; the ExpertStore's, under its lock.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace switchyard {

class LoadBudget {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  // Without a step for so long, the worker is idle.
  static constexpr std::chrono::milliseconds kIdle{100};

  // `part_bytes`: what one Take takes.
  explicit LoadBudget(int64_t part_bytes) : part_bytes_(part_bytes) {}

  // A load begins, with nothing saved up. `bytes_per_step` 0: it is not held back.
  void Begin(int64_t bytes_per_step) {
    bytes_per_step_ = bytes_per_step;
    saved_bytes_ = 0;
  }
  // A step has begun at `now`. Of what earlier steps left, at most a part is kept.
  void CountStep(TimePoint now) {
    last_step_ = now;
    saved_bytes_ = std::min(saved_bytes_, part_bytes_) + bytes_per_step_;
  }
  // Whether the next part may be loaded; if so, it counts as loaded.
  bool Take(bool step_under_way, TimePoint now) {
    if (bytes_per_step_ == 0) return true;
    if (step_under_way) last_step_ = now;
    if (now - last_step_ >= kIdle) return true;
    if (saved_bytes_ < part_bytes_) return false;
    saved_bytes_ -= part_bytes_;
    return true;
  }
  // When Take may succeed without another step.
  TimePoint idle_at() const { return last_step_ + kIdle; }

 private:
  const int64_t part_bytes_;
  int64_t bytes_per_step_ = 0;
  int64_t saved_bytes_ = 0;
  TimePoint last_step_;
};

}  // namespace switchyard
