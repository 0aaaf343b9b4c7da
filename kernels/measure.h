// For benchmarks: what a sample of measurements says, and processor time.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "kernels/check.h"

namespace switchyard {

// The value at or next to the quantile q in [0, 1]; 0 of none.
inline double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0.0;
  const auto at = static_cast<std::ptrdiff_t>(q * static_cast<double>(values.size() - 1) + 0.5);
  std::ranges::nth_element(values, values.begin() + at);
  return values[static_cast<size_t>(at)];
}
inline double Median(std::vector<double> values) { return Quantile(std::move(values), 0.5); }

// Processor time, user and system: CLOCK_THREAD_CPUTIME_ID of the calling thread,
// CLOCK_PROCESS_CPUTIME_ID of the process. What else runs on the machine does not count.
inline double CpuSeconds(clockid_t clock) {
  timespec now;
  SY_CHECK_EQ(clock_gettime(clock, &now), 0);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace switchyard
