#include "server/text/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace switchyard {
namespace {

// The length of the longest suffix of `text` that is a proper prefix of `stop`.
size_t Overlap(std::string_view text, std::string_view stop) {
  for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
    if (text.substr(text.size() - n) == stop.substr(0, n)) return n;
  }
  return 0;
}

}  // namespace

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop)
    : stops_(std::move(stops)), include_stop_(include_stop) {}

StopMatcher::Output StopMatcher::Push(std::string_view piece) {
  Output output;
  if (matched_) return output;
  std::string text = std::move(held_);
  held_.clear();
  text += piece;
  size_t best_begin = 0, best_end = std::string::npos;
  for (size_t i = 0; i < stops_.size(); ++i) {
    if (stops_[i].empty()) continue;
    const size_t begin = text.find(stops_[i]);
    if (begin == std::string::npos) continue;
    const size_t end = begin + stops_[i].size();
    if (end < best_end || (end == best_end && begin < best_begin)) {
      best_begin = begin;
      best_end = end;
      output.match = i;
    }
  }
  if (output.match) {
    matched_ = true;
    output.text = text.substr(0, include_stop_ ? best_end : best_begin);
    return output;
  }
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    if (!stop.empty()) keep = std::max(keep, Overlap(text, stop));
  }
  held_ = text.substr(text.size() - keep);
  output.text = text.substr(0, text.size() - keep);
  return output;
}

std::string StopMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace switchyard
