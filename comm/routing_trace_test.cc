#include "comm/routing_trace.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "comm/recorded_workload.h"
#include "comm/test_problems.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace switchyard {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::string TestPath() {
  const auto* info = testing::UnitTest::GetInstance()->current_test_info();
  return absl::StrCat(testing::TempDir(), "/", info->name(), ".", getpid(), ".trace");
}

std::vector<std::byte> FileBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

// A random step; what it says of each row also goes into `expected`, the last one staying.
struct Expected {
  std::vector<uint16_t> ids;
  std::vector<float> weights;
};
using Rows = std::map<std::pair<uint64_t, int32_t>, Expected>;

struct OwnedStep {
  std::vector<RoutingRun> runs;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  RoutingStep view() const { return {.runs = runs, .ids = ids, .weights = weights}; }
};

OwnedStep RandomStep(const RoutingTraceShape& shape, std::mt19937& random, Rows* expected) {
  OwnedStep step;
  std::vector<std::pair<uint64_t, int32_t>> rows;
  for (size_t r = 0, runs = 1 + random() % 5; r < runs; ++r) {
    const RoutingRun run{1 + random() % 4, static_cast<int32_t>(random() % 30),
                         static_cast<int32_t>(1 + random() % 6)};
    step.runs.push_back(run);
    for (int32_t i = 0; i < run.count; ++i) rows.emplace_back(run.sequence, run.position + i);
  }
  for (const auto& row : rows) (*expected)[row] = {};  // a step may name a row twice
  std::vector<Expected> said(rows.size());
  for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
    for (size_t row = 0; row < rows.size(); ++row) {
      for (int32_t j = 0; j < shape.top_k; ++j) {
        const int32_t id =
            static_cast<int32_t>(random() % static_cast<uint32_t>(shape.num_experts + 1)) - 1;
        step.ids.push_back(id);
        step.weights.push_back(static_cast<float>(random()));
        said[row].ids.push_back(static_cast<uint16_t>(id));  // -1: kNoExpert
        said[row].weights.push_back(step.weights.back());
      }
    }
  }
  for (size_t row = 0; row < rows.size(); ++row) (*expected)[rows[row]] = said[row];
  return step;
}

TEST(RoutingTrace, ReadsWhatWasWritten) {
  std::mt19937 random = SeededRng();
  const std::string path = TestPath();
  for (int32_t num_experts : {1, 16, 254, 255, 256, 65534}) {
    for (bool has_weights : {true, false}) {
      const RoutingTraceShape shape{
          .num_layers = 3, .num_experts = num_experts, .top_k = 2, .has_weights = has_weights};
      Rows expected;
      int64_t written = 0;
      auto writer = RoutingTraceWriter::Create(path, shape);
      ASSERT_TRUE(writer.ok()) << writer.status();
      for (int i = 0; i < 20; ++i) {
        const OwnedStep step = RandomStep(shape, random, &expected);
        for (const RoutingRun& run : step.runs) written += run.count;
        ASSERT_TRUE((*writer)->Append(step.view()).ok());
      }
      ASSERT_TRUE((*writer)->Close().ok());
      EXPECT_EQ((*writer)->num_bytes(), static_cast<int64_t>(std::filesystem::file_size(path)));

      const auto trace = ReadRoutingTrace(path);
      ASSERT_TRUE(trace.ok()) << trace.status();
      EXPECT_EQ(trace->shape, shape);
      ASSERT_EQ(trace->rows.size(), expected.size());
      EXPECT_EQ(trace->num_replaced, written - static_cast<int64_t>(expected.size()));
      EXPECT_EQ(trace->num_unread_bytes, 0);
      size_t row = 0;
      for (const auto& [key, value] : expected) {
        EXPECT_EQ(trace->rows[row], (RoutingTrace::Row{key.first, key.second}));
        const auto at = static_cast<std::ptrdiff_t>(row++ * trace->row_ids());
        EXPECT_TRUE(std::equal(value.ids.begin(), value.ids.end(), trace->ids.begin() + at));
        if (has_weights) {
          EXPECT_TRUE(
              std::equal(value.weights.begin(), value.weights.end(), trace->weights.begin() + at));
        }
      }
      EXPECT_EQ(trace->weights.size(), has_weights ? trace->ids.size() : 0);
    }
  }
  std::filesystem::remove(path);
}

// A file of two blocks of one row each, 1 layer, 4 experts, top 2.
class RoutingTraceFile : public testing::Test {
 protected:
  RoutingTraceFile() {
    const std::string path = TestPath();
    auto writer = RoutingTraceWriter::Create(path, {.num_layers = 1, .num_experts = 4, .top_k = 2});
    EXPECT_TRUE(writer.ok()) << writer.status();
    for (uint64_t sequence : {7, 8}) {
      const OwnedStep step{{{sequence, 5, 1}}, {3, -1}, {0.5f, 0.0f}};
      EXPECT_TRUE((*writer)->Append(step.view()).ok());
      ends_.push_back(static_cast<size_t>((*writer)->num_bytes()));
    }
    EXPECT_TRUE((*writer)->Close().ok());
    bytes_ = FileBytes(path);
    std::filesystem::remove(path);
  }
  std::string ErrorWith(size_t at, uint8_t value) const {
    std::vector<std::byte> bytes = bytes_;
    bytes[at] = std::byte{value};
    return std::string(ParseRoutingTrace(bytes, "file").status().message());
  }
  std::vector<std::byte> bytes_;
  std::vector<size_t> ends_;  // of the blocks
};

TEST_F(RoutingTraceFile, HasTheDocumentedBytes) {
  EXPECT_EQ(bytes_.size(), 40u + 2 * (24 + 16 + 2 + 8));
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes_.data()), 8), "SYROUTES");
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes_.data()) + 40, 4), "STEP");
  EXPECT_EQ(bytes_[40 + 24 + 16], std::byte{3});
  EXPECT_EQ(bytes_[40 + 24 + 17], std::byte{0xff});
}

TEST_F(RoutingTraceFile, CutOffAnywhereItIsReadUpToTheLastWholeBlock) {
  for (size_t size = 0; size <= bytes_.size(); ++size) {
    const auto trace = ParseRoutingTrace(std::span(bytes_).first(size), "file");
    ASSERT_EQ(trace.ok(), size >= 40) << size;
    if (!trace.ok()) continue;
    const size_t rows = size >= ends_[1] ? 2 : size >= ends_[0] ? 1 : 0;
    EXPECT_EQ(trace->rows.size(), rows);
    EXPECT_EQ(trace->num_unread_bytes,
              static_cast<int64_t>(size - (rows == 0 ? 40 : ends_[rows - 1])));
  }
}

TEST_F(RoutingTraceFile, EveryChangedByteIsAnError) {
  // But for a larger size in the last block, which looks like one that was cut off.
  for (size_t at = 0; at < bytes_.size(); ++at) {
    std::vector<std::byte> bytes = bytes_;
    bytes[at] ^= std::byte{1};
    const auto trace = ParseRoutingTrace(bytes, "file");
    EXPECT_TRUE(!trace.ok() || trace->num_unread_bytes > 0) << at;
  }
  EXPECT_THAT(ErrorWith(0, 'X'), HasSubstr("not a routing trace"));
  EXPECT_THAT(ErrorWith(8, 9), HasSubstr("version 9 of routing traces, this reads 1"));
  EXPECT_THAT(ErrorWith(16, 5), HasSubstr("header's checksum"));
  EXPECT_THAT(ErrorWith(ends_[0], 'X'), HasSubstr(absl::StrCat("no block at byte ", ends_[0])));
  EXPECT_THAT(ErrorWith(ends_[0] + 30, 1),
              HasSubstr(absl::StrCat("checksum of the block at byte ", ends_[0])));
  EXPECT_THAT(ErrorWith(44, 2), HasSubstr("has 2 runs of 1 rows"));
}

TEST(RoutingTrace, BadShapesAndPathsAreErrors) {
  EXPECT_THAT(std::string(RoutingTraceWriter::Create(
                              TestPath(), {.num_layers = 0, .num_experts = 4, .top_k = 2})
                              .status()
                              .message()),
              HasSubstr("not 0, 4 and 2"));
  EXPECT_THAT(std::string(RoutingTraceWriter::Create(
                              "/nowhere/x", {.num_layers = 1, .num_experts = 4, .top_k = 2})
                              .status()
                              .message()),
              HasSubstr("/nowhere/x: No such file"));
  EXPECT_THAT(std::string(ReadRoutingTrace("/nowhere/x").status().message()),
              HasSubstr("/nowhere/x"));
}

// Sequence s has s + 1 rows; its row p goes to expert (s + p) % 8 in layer 0, and to 0 in layer 1.
RoutingTrace Staircase(size_t num_sequences) {
  RoutingTrace trace;
  trace.shape = {.num_layers = 2, .num_experts = 8, .top_k = 1, .has_weights = false};
  for (size_t s = 0; s < num_sequences; ++s) {
    for (size_t p = 0; p <= s; ++p) {
      trace.rows.push_back({s, static_cast<int32_t>(p)});
      trace.ids.push_back(static_cast<uint16_t>((s + p) % 8));
      trace.ids.push_back(0);
    }
  }
  return trace;
}

TEST(RoutingTrace, LayerLoads) {
  const std::vector<RoutingLayerLoad> loads = RoutingLayerLoads(Staircase(3));  // 0, 1 2, 2 3 4
  ASSERT_EQ(loads.size(), 2u);
  EXPECT_EQ(loads[0].copies, 6);
  EXPECT_EQ(loads[0].distinct_experts, 5);
  EXPECT_DOUBLE_EQ(loads[0].max_mean, 2.0 / (6.0 / 8.0));
  EXPECT_EQ(loads[1].distinct_experts, 1);
  EXPECT_DOUBLE_EQ(loads[1].max_mean, 8.0);
  EXPECT_THAT(LayersToReplay(Staircase(3)), ElementsAre(1, 0));
}

TEST(RecordedWorkload, PrefillTakesTheRowsInOrderAndBeginsAgain) {
  const RoutingTrace trace = Staircase(3);  // layer 0: experts 0 | 1 2 | 2 3 4
  RecordedWorkload workload(
      {.trace = &trace, .layer = 0, .order = ReplayOrder::kPrefill, .num_sources = 2, .tokens = 4});
  EXPECT_EQ(workload.tokens(), 4);
  EXPECT_THAT(workload.Next(), ElementsAre(1, 0, 1, 0, 0, 0, 0, 0, /**/ 0, 1, 1, 0, 0, 0, 0, 0));
  EXPECT_THAT(workload.Next(), ElementsAre(1, 0, 0, 1, 1, 0, 0, 0, /**/ 0, 1, 0, 0, 0, 0, 0, 0));
}

TEST(RecordedWorkload, DecodeHasOneRowOfEachSequence) {
  const RoutingTrace trace = Staircase(6);
  RecordedWorkload workload({.trace = &trace, .layer = 0, .num_sources = 1, .tokens = 100});
  EXPECT_EQ(workload.tokens(), 6);
  int64_t total = 0;
  for (int step = 0; step < 50; ++step) {
    const std::span<const int32_t> counts = workload.Next();
    EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), 0), 6);
    total += counts[7];
  }
  EXPECT_GT(total, 0);
  // Two places over three sequences: each goes on where it was and takes the next one at its end.
  const RoutingTrace small = Staircase(3);
  RecordedWorkload two({.trace = &small, .layer = 0, .num_sources = 2, .tokens = 2});
  // Place 0: 0 | 2 3 4 | …; place 1, from the middle on: 2 | 0 | 1 2 | …
  EXPECT_THAT(two.Next(), ElementsAre(1, 0, 0, 0, 0, 0, 0, 0, /**/ 0, 0, 1, 0, 0, 0, 0, 0));
  EXPECT_THAT(two.Next(), ElementsAre(0, 0, 1, 0, 0, 0, 0, 0, /**/ 1, 0, 0, 0, 0, 0, 0, 0));
  EXPECT_THAT(two.Next(), ElementsAre(0, 0, 0, 1, 0, 0, 0, 0, /**/ 0, 1, 0, 0, 0, 0, 0, 0));
}

}  // namespace
}  // namespace switchyard
