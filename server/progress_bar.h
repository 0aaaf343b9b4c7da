// ProgressBar: progress of a long task on stderr: a bar that redraws on a terminal, else a line at
// every 10 %. Owned by the task, used by one thread at a time.
#pragma once

#include <cstdint>
#include <string>

namespace switchyard {

class ProgressBar {
 public:
  // `label` stands in front: "loading". `quiet`: nothing is printed (logs are JSON, for example).
  ProgressBar(std::string label, int64_t total, bool quiet);
  ~ProgressBar();  // ends the line
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  // `done` of `total`; `note` follows the bar.
  void Update(int64_t done, const std::string& note = "");

 private:
  const std::string label_;
  const int64_t total_;
  const bool quiet_;
  const bool terminal_;
  int shown_percent_ = -1;
  std::string shown_note_;
};

}  // namespace switchyard
