#include "tests/fail_points.h"

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

namespace switchyard {
namespace {

// "computing" has no message to hang on: a moment after the rows came, before the answer leaves.
constexpr std::chrono::microseconds kIntoComputing{40};

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

FailPoints::FailPoints() : file_(Environment("SWITCHYARD_FAIL_FILE")) {
  if (const std::string token = Environment("SWITCHYARD_FAIL_TOKEN"); !token.empty())
    token_ = std::stoi(token);
  const std::string row = Environment("SWITCHYARD_FAIL_ROW");
  show_rows_ = row == "show";
  if (!row.empty() && !show_rows_) row_ = std::stoull(row);
}

void FailPoints::Poll(uint64_t step) {
  if (file_.empty() || access(file_.c_str(), R_OK) != 0) return;
  Armed armed;
  uint64_t steps = 0;
  std::ifstream(file_) >> armed.phase >> steps >> armed.layer >> armed.action;
  unlink(file_.c_str());
  armed.step = step + steps;
  MutexLock lock(mu_);
  armed_ = armed;
}

void FailPoints::Pass(std::string_view phase, uint64_t step, int32_t layer) {
  Armed armed;
  {
    MutexLock lock(mu_);
    if (!armed_ || step < armed_->step || (armed_->layer >= 0 && layer != armed_->layer)) return;
    armed = *armed_;
  }
  if (armed.phase == phase) Fire(armed, step, layer);
  if (armed.phase != "computing") return;
  if (phase == "received") {
    std::thread([armed, step, layer] {
      std::this_thread::sleep_for(kIntoComputing);
      Fire(armed, step, layer);
    }).detach();
  } else if (phase == "moving" || phase == "computed") {
    Fire(armed, step, layer);
  }
}

void FailPoints::CheckRow(uint64_t hash) {
  if (show_rows_) std::fprintf(stderr, "row %llu\n", static_cast<unsigned long long>(hash));
  if (row_ == hash) Abort("a row with that hash");
}

void FailPoints::Abort(std::string_view where) {
  std::fprintf(stderr, "fail point: %.*s\n", static_cast<int>(where.size()), where.data());
  std::abort();
}

void FailPoints::Fire(const Armed& armed, uint64_t step, int32_t layer) {
  if (step == UINT64_MAX) {
    std::fprintf(stderr, "fail point: %s\n", armed.phase.c_str());
  } else {
    std::fprintf(stderr, "fail point: %s at step %llu, MoE layer %d\n", armed.phase.c_str(),
                 static_cast<unsigned long long>(step), layer);
  }
  if (armed.action == "kill") kill(getpid(), SIGKILL);
  if (armed.action == "abort") std::abort();
  for (;;) pause();
}

}  // namespace switchyard
