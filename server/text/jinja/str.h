// A string that remembers which of its bytes come from the template (trusted) and which from the
// request.
//
// Owner: server/text/jinja. A value type, no sharing, any thread. Invariant: the runs cover the
// text without gaps, none is empty, neighbours differ. Must never turn untrusted bytes into trusted
// ones.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/text/tokenizer.h"

namespace switchyard::jinja {

class Str {
 public:
  Str() = default;
  static Str Trusted(std::string_view text) { return Str(text, true); }
  static Str Untrusted(std::string_view text) { return Str(text, false); }

  const std::string& text() const { return text_; }
  size_t size() const { return text_.size(); }  // in bytes
  bool empty() const { return text_.empty(); }

  void Append(std::string_view text, bool trusted) {
    if (text.empty()) return;
    text_ += text;
    if (!runs_.empty() && runs_.back().trusted == trusted) {
      runs_.back().end = text_.size();
    } else {
      runs_.push_back({text_.size(), trusted});
    }
  }

  void Append(const Str& other) {
    size_t begin = 0;
    for (const Run& run : other.runs_) {
      Append(std::string_view(other.text_).substr(begin, run.end - begin), run.trusted);
      begin = run.end;
    }
  }

  // Bytes [begin, end). REQUIRES: begin ≤ end ≤ size().
  Str Sub(size_t begin, size_t end) const {
    Str out;
    size_t run_begin = 0;
    for (const Run& run : runs_) {
      const size_t from = run_begin > begin ? run_begin : begin;
      const size_t to = run.end < end ? run.end : end;
      if (from < to) out.Append(std::string_view(text_).substr(from, to - from), run.trusted);
      run_begin = run.end;
      if (run.end >= end) break;
    }
    return out;
  }

  // Every run passed through `f(std::string_view) → std::string`.
  template <typename F>
  Str MapRuns(F f) const {
    Str out;
    size_t begin = 0;
    for (const Run& run : runs_) {
      out.Append(f(std::string_view(text_).substr(begin, run.end - begin)), run.trusted);
      begin = run.end;
    }
    return out;
  }

  std::vector<TextSegment> Segments() const {
    std::vector<TextSegment> segments;
    size_t begin = 0;
    for (const Run& run : runs_) {
      segments.push_back({text_.substr(begin, run.end - begin), run.trusted});
      begin = run.end;
    }
    return segments;
  }

 private:
  struct Run {
    size_t end;
    bool trusted;
  };
  Str(std::string_view text, bool trusted) { Append(text, trusted); }

  std::string text_;
  std::vector<Run> runs_;
};

}  // namespace switchyard::jinja
