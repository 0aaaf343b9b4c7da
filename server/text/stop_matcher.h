// Finds stop strings in a text that arrives in pieces. Holds back only the longest suffix that can
// still begin a stop string, so a stream is delayed by no more than it must.
//
// Owner: the request that streams; not thread-safe. Must never emit text behind the first match.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace switchyard {

class StopMatcher {
 public:
  // Empty stop strings are ignored. `include_stop`: the matched string itself is emitted too.
  StopMatcher(std::vector<std::string> stops, bool include_stop);

  struct Output {
    std::string text;  // safe to send
    std::optional<size_t>
        match;  // index into `stops` of the string that ended the text; then nothing follows
  };
  // The match that ends first wins, of those the one that begins first. After a match Push returns
  // nothing.
  Output Push(std::string_view piece);
  // The held text; call at the end when there was no match.
  std::string Flush();

  size_t held_bytes() const { return held_.size(); }
  bool matched() const { return matched_; }

 private:
  const std::vector<std::string> stops_;
  const bool include_stop_;
  bool matched_ = false;
  std::string held_;  // a proper prefix of at least one stop string, or empty
};

}  // namespace switchyard
