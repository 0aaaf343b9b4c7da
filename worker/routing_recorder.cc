#include "worker/routing_recorder.h"

#include <algorithm>

#include "kernels/check.h"
#include "spdlog/spdlog.h"

namespace switchyard {
namespace {

constexpr int64_t kQueueBytes = 64 << 20;  // beyond one record per worker
constexpr int64_t kMostQueued = 64;        // records

int32_t NumRecords(const RoutingTraceShape& shape, int32_t max_rows, int32_t num_workers) {
  const int64_t queued = kQueueBytes / RoutingRecord::Bytes(shape, max_rows);
  return num_workers + static_cast<int32_t>(std::clamp<int64_t>(queued, 2, kMostQueued));
}

size_t Copies(const RoutingTraceShape& shape, int64_t rows) {
  return static_cast<size_t>(rows) * static_cast<size_t>(shape.num_layers) *
         static_cast<size_t>(shape.top_k);
}

int64_t NumRows(std::span<const SequenceWork> work) {
  int64_t rows = 0;
  for (const SequenceWork& w : work) rows += w.count;
  return rows;
}

}  // namespace

RoutingRecord::RoutingRecord(const RoutingTraceShape& shape, int32_t max_rows)
    : shape_(shape), ids_(Copies(shape, max_rows)), weights_(shape.has_weights ? ids_.size() : 0) {
  runs_.reserve(static_cast<size_t>(max_rows));
}

int64_t RoutingRecord::Bytes(const RoutingTraceShape& shape, int32_t max_rows) {
  return max_rows * static_cast<int64_t>(sizeof(RoutingRun)) +
         static_cast<int64_t>(Copies(shape, max_rows)) * (shape.has_weights ? 8 : 4);
}

void RoutingRecord::SetRows(std::span<const SequenceWork> work) {
  runs_.clear();
  num_rows_ = static_cast<size_t>(NumRows(work));
  SY_CHECK_LE(Copies(shape_, static_cast<int64_t>(num_rows_)), ids_.size());
  for (const SequenceWork& w : work) {
    if (w.count > 0) runs_.push_back({w.sequence, w.start, w.count});
  }
}

void RoutingRecord::SetLayer(int32_t layer, std::span<const int32_t> ids,
                             std::span<const float> weights) {
  const size_t copies = num_rows_ * static_cast<size_t>(shape_.top_k);
  SY_CHECK_EQ(ids.size(), copies);
  SY_CHECK_EQ(weights.size(), copies);
  const size_t begin = static_cast<size_t>(layer) * copies;
  std::ranges::copy(ids, ids_.begin() + static_cast<std::ptrdiff_t>(begin));
  if (shape_.has_weights) {
    std::ranges::copy(weights, weights_.begin() + static_cast<std::ptrdiff_t>(begin));
  }
}

RoutingStep RoutingRecord::step() const {
  const size_t copies = Copies(shape_, static_cast<int64_t>(num_rows_));
  return {.runs = runs_,
          .ids = std::span(ids_).first(copies),
          .weights = std::span(weights_).first(shape_.has_weights ? copies : 0)};
}

absl::StatusOr<std::unique_ptr<RoutingRecorder>> RoutingRecorder::Create(
    const RoutingRecorderOptions& options, RoutingTraceShape shape, int32_t max_rows,
    int32_t num_workers) {
  shape.has_weights = options.has_weights;
  auto file = RoutingTraceWriter::Create(options.path, shape);
  if (!file.ok()) return file.status();
  // The constructor is private, so make_unique cannot reach it.
  return std::unique_ptr<RoutingRecorder>(
      new RoutingRecorder(*std::move(file), shape, max_rows,
                          NumRecords(shape, max_rows, num_workers), options.wait_when_full));
}

int64_t RoutingRecorder::BufferBytes(const RoutingTraceShape& shape, int32_t max_rows,
                                     int32_t num_workers) {
  // The writer lays out one block more.
  return (NumRecords(shape, max_rows, num_workers) + int64_t{1}) *
         RoutingRecord::Bytes(shape, max_rows);
}

RoutingRecorder::RoutingRecorder(std::unique_ptr<RoutingTraceWriter> file,
                                 const RoutingTraceShape& shape, int32_t max_rows,
                                 int32_t num_records, bool wait_when_full)
    : wait_when_full_(wait_when_full), file_(std::move(file)) {
  free_.reserve(static_cast<size_t>(num_records));
  queue_.reserve(static_cast<size_t>(num_records));
  for (int32_t i = 0; i < num_records; ++i) {
    records_.push_back(std::make_unique<RoutingRecord>(shape, max_rows));
    free_.push_back(records_.back().get());
  }
  totals_.bytes = file_->num_bytes();
  writer_ = std::thread([this] { Write(); });
}

RoutingRecorder::~RoutingRecorder() { Close().IgnoreError(); }

RoutingRecord* RoutingRecorder::Begin(std::span<const SequenceWork> work) {
  MutexLock lock(mu_);
  while (wait_when_full_ && free_.empty() && !closing_) changed_.Wait(mu_);
  if (free_.empty() || closing_) {
    totals_.dropped_rows += NumRows(work);
    return nullptr;
  }
  RoutingRecord* record = free_.back();
  free_.pop_back();
  record->SetRows(work);
  return record;
}

void RoutingRecorder::Commit(RoutingRecord* record) {
  MutexLock lock(mu_);
  if (closing_) {  // the writer may have gone
    totals_.dropped_rows += static_cast<int64_t>(record->num_rows_);
    free_.push_back(record);
    return;
  }
  queue_.push_back(record);
  changed_.NotifyAll();
}

void RoutingRecorder::Discard(RoutingRecord* record) {
  MutexLock lock(mu_);
  free_.push_back(record);
  changed_.NotifyAll();
}

void RoutingRecorder::Write() {
  std::vector<RoutingRecord*> taken;
  taken.reserve(records_.size());
  for (;;) {
    bool failed = false;
    {
      MutexLock lock(mu_);
      while (queue_.empty() && !closing_) changed_.Wait(mu_);
      if (queue_.empty()) return;
      taken.swap(queue_);  // both have room for all records
      failed = !status_.ok();
    }
    for (RoutingRecord* record : taken) {
      const absl::Status status = failed ? absl::OkStatus() : file_->Append(record->step());
      if (!status.ok())
        spdlog::error("{}; nothing more is recorded", std::string(status.message()));
      MutexLock lock(mu_);
      status_.Update(status);
      failed = !status_.ok();
      if (failed) {
        totals_.dropped_rows += static_cast<int64_t>(record->num_rows_);
      } else {
        ++totals_.steps;
        totals_.rows += static_cast<int64_t>(record->num_rows_);
        totals_.bytes = file_->num_bytes();
      }
      free_.push_back(record);
      changed_.NotifyAll();
    }
    taken.clear();
  }
}

absl::Status RoutingRecorder::Close() {
  {
    MutexLock lock(mu_);
    closing_ = true;
    changed_.NotifyAll();
  }
  if (writer_.joinable()) writer_.join();
  MutexLock lock(mu_);
  status_.Update(file_->Close());
  return status_;
}

RoutingRecorder::Totals RoutingRecorder::totals() const {
  MutexLock lock(mu_);
  return totals_;
}

}  // namespace switchyard
