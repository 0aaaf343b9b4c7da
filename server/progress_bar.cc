#include "server/progress_bar.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace switchyard {
namespace {

constexpr int kWidth = 30;     // characters of the bar
constexpr int kLineStep = 10;  // percent between two lines without a terminal

}  // namespace

ProgressBar::ProgressBar(std::string label, int64_t total, bool quiet)
    : label_(std::move(label)),
      total_(std::max<int64_t>(total, 1)),
      quiet_(quiet),
      terminal_(isatty(STDERR_FILENO)) {}

ProgressBar::~ProgressBar() {
  if (!quiet_ && terminal_ && shown_percent_ >= 0) std::fputc('\n', stderr);
}

void ProgressBar::Update(int64_t done, const std::string& note) {
  if (quiet_) return;
  const int percent = static_cast<int>(std::clamp<int64_t>(done, 0, total_) * 100 / total_);
  if (terminal_) {
    if (percent == shown_percent_ && note == shown_note_) return;
    const std::string bar(static_cast<size_t>(percent * kWidth / 100), '#');
    std::fprintf(stderr, "\r\033[K%s [%-*s] %3d %% %s", label_.c_str(), kWidth, bar.c_str(),
                 percent, note.c_str());
    std::fflush(stderr);
  } else {
    if (shown_percent_ >= 0 && percent / kLineStep == shown_percent_ / kLineStep) return;
    std::fprintf(stderr, "%s %d %%%s%s\n", label_.c_str(), percent, note.empty() ? "" : " ",
                 note.c_str());
  }
  shown_percent_ = percent;
  shown_note_ = note;
}

}  // namespace switchyard
