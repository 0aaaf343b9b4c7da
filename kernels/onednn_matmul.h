// oneDNN's matrix product, for comparison: only `bench kernels` links it. Weights in the layout
// that the library prefers, packed before the first run; OpenMP threads of its own.
#pragma once

#include <cstdint>
#include <memory>

namespace switchyard {

enum class OneDnnType : uint8_t { kF32, kBF16, kInt8 };

// out [m, n] float32 = x [m, k] w [n, k]^T with float32 or bfloat16 numbers, or unsigned times
// signed bytes (without scales: less work than ours). Random values.
class OneDnnMatmul {
 public:
  struct Shape {
    OneDnnType type = OneDnnType::kBF16;
    int64_t m = 0, n = 0, k = 0;
    int64_t num_weights = 1;  // equal ones at different addresses
  };
  // Whether oneDNN has a kernel for this CPU: for bfloat16 it needs AVX-512.
  static bool Supports(OneDnnType type);

  // REQUIRES: Supports(shape.type)
  OneDnnMatmul(const Shape& shape, int num_threads);
  ~OneDnnMatmul();
  void Run(int64_t weight);
  // Ends the threads that its OpenMP runtime keeps for the calling thread: idle, they would spin
  // into what is timed next. Run starts them again. REQUIRES: Run was called since the last time.
  static void StopThreads();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace switchyard
