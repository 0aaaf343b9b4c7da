#include "server/text/stop_matcher.h"

#include <gtest/gtest.h>

#include <random>

namespace switchyard {
namespace {

// The specification: the text before the match that ends first, of those the one that begins first.
std::string Whole(const std::string& text, const std::vector<std::string>& stops, bool include,
                  bool* matched) {
  size_t begin = 0, end = std::string::npos;
  for (size_t e = 1; e <= text.size() && end == std::string::npos; ++e) {
    size_t best = std::string::npos;
    for (const std::string& stop : stops) {
      if (stop.empty() || stop.size() > e || text.compare(e - stop.size(), stop.size(), stop) != 0)
        continue;
      best = std::min(best, e - stop.size());
    }
    if (best == std::string::npos) continue;
    begin = best;
    end = e;
  }
  *matched = end != std::string::npos;
  return *matched ? text.substr(0, include ? end : begin) : text;
}

TEST(StopMatcherTest, HoldsOnlyWhatCanStillBecomeAStop) {
  StopMatcher matcher({"###", "\nUser:"}, /*include_stop=*/false);
  EXPECT_EQ(matcher.Push("abc#").text, "abc");
  EXPECT_EQ(matcher.held_bytes(), 1u);
  EXPECT_EQ(matcher.Push("x").text, "#x");
  EXPECT_EQ(matcher.Push("\nUs").text, "");
  EXPECT_EQ(matcher.Push("ual").text, "\nUsual");
  const auto last = matcher.Push("##\nUser: hi");
  EXPECT_EQ(last.text, "##");
  EXPECT_EQ(last.match, 1u);
  EXPECT_EQ(matcher.Push("more").text, "");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcherTest, FlushGivesTheHeldText) {
  StopMatcher matcher({"stop"}, /*include_stop=*/false);
  EXPECT_EQ(matcher.Push("don't sto").text, "don't ");
  EXPECT_EQ(matcher.Flush(), "sto");
}

TEST(StopMatcherTest, IncludesTheStopWhenAsked) {
  StopMatcher matcher({"END"}, /*include_stop=*/true);
  EXPECT_EQ(matcher.Push("the EN").text, "the ");
  EXPECT_EQ(matcher.Push("D of").text, "END");
  EXPECT_TRUE(matcher.matched());
}

TEST(StopMatcherTest, PiecesDoNotMatter) {
  const uint32_t seed = 20240607;
  SCOPED_TRACE(seed);
  std::mt19937 rng(seed);
  const auto word = [&](size_t max) {
    std::string text;
    for (size_t n = rng() % (max + 1); n > 0; --n) text += static_cast<char>('a' + rng() % 2);
    return text;
  };
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> stops;
    for (size_t n = rng() % 4; n > 0; --n) stops.push_back(word(5));
    const std::string text = word(20);
    const bool include = rng() % 2 == 0;
    StopMatcher matcher(stops, include);
    std::string got;
    for (size_t pos = 0; pos < text.size();) {
      const size_t size = std::min(text.size() - pos, 1 + rng() % 4);
      // A piece is looked at as a whole: feed single characters to see each end.
      for (size_t i = 0; i < size; ++i) got += matcher.Push(text.substr(pos + i, 1)).text;
      pos += size;
    }
    StopMatcher at_once(stops, include);
    std::string whole = at_once.Push(text).text;
    if (!at_once.matched()) whole += at_once.Flush();
    got += matcher.Flush();
    bool matched = false;
    const std::string want = Whole(text, stops, include, &matched);
    EXPECT_EQ(got, want) << text << " " << testing::PrintToString(stops);
    EXPECT_EQ(whole, want) << text << " " << testing::PrintToString(stops);
    EXPECT_EQ(matcher.matched(), matched);
  }
}

}  // namespace
}  // namespace switchyard
