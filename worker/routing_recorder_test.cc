#include "worker/routing_recorder.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace switchyard {
namespace {

using testing::HasSubstr;

constexpr RoutingTraceShape kShape{.num_layers = 2, .num_experts = 8, .top_k = 2};

std::string TestPath() {
  const auto* info = testing::UnitTest::GetInstance()->current_test_info();
  return absl::StrCat(testing::TempDir(), "/", info->name(), ".", getpid(), ".trace");
}

std::vector<SequenceWork> Work(uint64_t sequence, int32_t start, int32_t count) {
  SequenceWork work;
  work.sequence = sequence;
  work.start = start;
  work.count = count;
  return {work};
}

void Fill(RoutingRecord* record, int32_t rows, int32_t first_id) {
  std::vector<int32_t> ids(static_cast<size_t>(rows) * 2);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = (first_id + static_cast<int32_t>(i)) % 8;
  const std::vector<float> weights(ids.size(), 0.5f);
  for (int32_t layer = 0; layer < kShape.num_layers; ++layer) record->SetLayer(layer, ids, weights);
}

std::unique_ptr<RoutingRecorder> Make(const RoutingRecorderOptions& options,
                                      int32_t num_workers = 1) {
  auto recorder = RoutingRecorder::Create(options, kShape, 16, num_workers);
  EXPECT_TRUE(recorder.ok()) << recorder.status();
  return recorder.ok() ? *std::move(recorder) : nullptr;
}

TEST(RoutingRecorder, TheLastCommitCountsAndDiscardedStepsDoNot) {
  const std::string path = TestPath();
  const auto recorder = Make({.path = path});
  ASSERT_NE(recorder, nullptr);
  RoutingRecord* const late = recorder->Begin(Work(1, 0, 4));
  for (int32_t id : {1, 2, 3}) {
    RoutingRecord* record = recorder->Begin(Work(5, 10, 1));
    ASSERT_NE(record, nullptr);
    Fill(record, 1, id);
    if (id == 3) recorder->Discard(record);
    if (id != 3) recorder->Commit(record);
  }
  ASSERT_TRUE(recorder->Close().ok());
  EXPECT_TRUE(recorder->Close().ok());
  EXPECT_EQ(recorder->Begin(Work(1, 0, 1)), nullptr) << "closed";
  Fill(late, 4, 0);
  recorder->Commit(late);
  EXPECT_EQ(recorder->totals().dropped_rows, 5);
  EXPECT_EQ(recorder->totals().steps, 2);
  EXPECT_EQ(recorder->totals().rows, 2);
  EXPECT_EQ(recorder->totals().bytes, static_cast<int64_t>(std::filesystem::file_size(path)));
  const auto trace = ReadRoutingTrace(path);
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_EQ(trace->rows.size(), 1u);
  EXPECT_EQ(trace->num_replaced, 1);
  EXPECT_EQ(trace->Experts(0, 1)[0], 2);
  std::filesystem::remove(path);
}

// A disk that takes nothing: a pipe that nobody empties.
class SlowDisk : public testing::Test {
 protected:
  SlowDisk() : path_(TestPath()) {
    EXPECT_EQ(mkfifo(path_.c_str(), 0600), 0);
    reader_ = open(path_.c_str(), O_RDONLY | O_NONBLOCK);
    EXPECT_GE(reader_, 0);
  }
  ~SlowDisk() override {
    if (reader_ >= 0) close(reader_);
    std::filesystem::remove(path_);
  }
  // Until the writer has closed its end.
  void Empty() {
    EXPECT_EQ(fcntl(reader_, F_SETFL, 0), 0);
    char buffer[4096];
    ssize_t got = 0;
    while ((got = read(reader_, buffer, sizeof(buffer))) > 0) emptied_ += got;
  }
  const std::string path_;
  int reader_ = -1;
  int64_t emptied_ = 0;
};

TEST_F(SlowDisk, StepsAreDroppedAndCounted) {
  const auto recorder = Make({.path = path_});
  ASSERT_NE(recorder, nullptr);
  int64_t begun = 0, dropped = 0;
  while (dropped < 30) {  // the queue and the pipe are full at some time
    RoutingRecord* record = recorder->Begin(Work(1, 0, 3));
    begun += 3;
    if (record == nullptr) {
      dropped += 3;
      continue;
    }
    Fill(record, 3, 0);
    recorder->Commit(record);
  }
  EXPECT_EQ(recorder->totals().dropped_rows, dropped);
  std::thread emptier([this] { Empty(); });
  EXPECT_TRUE(recorder->Close().ok());
  emptier.join();
  EXPECT_EQ(recorder->totals().rows, begun - dropped);
  EXPECT_EQ(recorder->totals().bytes, emptied_);
}

TEST_F(SlowDisk, OrTheWorkerWaits) {
  const auto recorder = Make({.path = path_, .wait_when_full = true});
  ASSERT_NE(recorder, nullptr);
  std::thread emptier([this] { Empty(); });
  constexpr int kSteps = 3000;
  for (int i = 0; i < kSteps; ++i) {
    RoutingRecord* record = recorder->Begin(Work(1, i, 2));
    ASSERT_NE(record, nullptr);
    Fill(record, 2, 0);
    recorder->Commit(record);
  }
  EXPECT_TRUE(recorder->Close().ok());
  emptier.join();
  EXPECT_EQ(recorder->totals().rows, 2 * kSteps);
  EXPECT_EQ(recorder->totals().dropped_rows, 0);
}

TEST_F(SlowDisk, AfterAWriteErrorRowsCountAsDropped) {
  const auto recorder = Make({.path = path_, .wait_when_full = true});
  ASSERT_NE(recorder, nullptr);
  signal(SIGPIPE, SIG_IGN);
  close(std::exchange(reader_, -1));
  for (int i = 0; i < 200; ++i) {
    RoutingRecord* record = recorder->Begin(Work(1, i, 2));
    ASSERT_NE(record, nullptr);
    Fill(record, 2, 0);
    recorder->Commit(record);
  }
  EXPECT_THAT(std::string(recorder->Close().message()), HasSubstr("Broken pipe"));
  EXPECT_EQ(recorder->totals().rows, 0);
  EXPECT_EQ(recorder->totals().dropped_rows, 400);
}

TEST(RoutingRecorder, ManyWorkers) {
  const std::string path = TestPath();
  const auto recorder = Make({.path = path, .wait_when_full = true}, 4);
  ASSERT_NE(recorder, nullptr);
  std::vector<std::thread> workers;
  for (uint64_t w = 1; w <= 4; ++w) {
    workers.emplace_back([&recorder, w] {
      for (int32_t i = 0; i < 500; ++i) {
        RoutingRecord* record = recorder->Begin(Work(w, i, 1));
        Fill(record, 1, static_cast<int32_t>(w) + i);
        recorder->Commit(record);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  ASSERT_TRUE(recorder->Close().ok());
  const auto trace = ReadRoutingTrace(path);
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_EQ(trace->rows.size(), 2000u);
  for (size_t row = 0; row < trace->rows.size(); ++row) {
    const auto& [sequence, position] = trace->rows[row];
    EXPECT_EQ(trace->Experts(row, 0)[0], (sequence + static_cast<uint64_t>(position)) % 8);
  }
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace switchyard
