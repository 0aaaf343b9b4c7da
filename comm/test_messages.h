// Messages that say who sent them, deadlines, and threads of ranks. Linked by tests and benchmarks
// only.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "comm/communicator.h"

namespace switchyard {

inline std::chrono::steady_clock::time_point In(std::chrono::milliseconds time) {
  return std::chrono::steady_clock::now() + time;
}
// Long enough for any machine; only a bug waits this long.
inline std::chrono::steady_clock::time_point Later() { return In(std::chrono::minutes(2)); }

inline MessageTag Tag(uint64_t step, int32_t layer = 0, MessageKind kind = MessageKind::kDispatch) {
  return {.step = step, .layer = layer, .micro_batch = 0, .kind = kind};
}

// Bytes that say who sent them to whom in which step.
inline std::vector<std::byte> Pattern(int32_t from, int32_t to, uint64_t step, size_t size) {
  std::vector<std::byte> bytes(size);
  uint32_t state =
      static_cast<uint32_t>(from * 7919 + to * 104729) + static_cast<uint32_t>(step) * 2654435761u;
  for (std::byte& b : bytes) {
    state = state * 1664525u + 1013904223u;
    b = static_cast<std::byte>(state >> 24);
  }
  return bytes;
}

// One rank's thread runs `body`; joined at the end of the scope.
class RankThreads {
 public:
  void Run(std::function<void()> body) { threads_.emplace_back(std::move(body)); }
  ~RankThreads() {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::vector<std::thread> threads_;
};

}  // namespace switchyard
