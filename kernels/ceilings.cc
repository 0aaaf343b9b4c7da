#include "kernels/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "kernels/bandwidth_probe.h"
#include "kernels/tensor.h"

namespace switchyard {
namespace {

constexpr int kRepetitions = 15;

// The shortest run of work(thread) on all threads at once, in seconds.
template <typename Work>
double BestSeconds(ThreadPool* pool, const Work& work) {
  double best = 1e9;
  for (int i = 0; i < kRepetitions; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    pool->ParallelFor(pool->num_threads(), work);
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

#if defined(__x86_64__)
// Twelve independent chains of one instruction on registers 2 to 13, all zero.
#define SY_CHAIN(INSTRUCTION, R)                                                                  \
  INSTRUCTION " %%" R "0, %%" R "1, %%" R "2\n" INSTRUCTION " %%" R "0, %%" R "1, %%" R           \
              "3\n" INSTRUCTION " %%" R "0, %%" R "1, %%" R "4\n" INSTRUCTION " %%" R "0, %%" R   \
              "1, %%" R "5\n" INSTRUCTION " %%" R "0, %%" R "1, %%" R "6\n" INSTRUCTION " %%" R   \
              "0, %%" R "1, %%" R "7\n" INSTRUCTION " %%" R "0, %%" R "1, %%" R "8\n" INSTRUCTION \
              " %%" R "0, %%" R "1, %%" R "9\n" INSTRUCTION " %%" R "0, %%" R "1, %%" R           \
              "10\n" INSTRUCTION " %%" R "0, %%" R "1, %%" R "11\n" INSTRUCTION " %%" R "0, %%" R \
              "1, %%" R "12\n" INSTRUCTION " %%" R "0, %%" R "1, %%" R "13\n"
#define SY_CHAINS(NAME, INSTRUCTION, R)                                                          \
  void NAME(int64_t rounds) {                                                                    \
    asm volatile("vzeroall\n1:\n" SY_CHAIN(INSTRUCTION, R) "dec %0\njnz 1b\nvzeroupper\n"        \
                 : "+r"(rounds)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                   "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");        \
  }
SY_CHAINS(Fma512, "vfmadd231ps", "zmm")
SY_CHAINS(Fma256, "vfmadd231ps", "ymm")
SY_CHAINS(Bf16Dot512, "vdpbf16ps", "zmm")
SY_CHAINS(Int8Dot512, "vpdpbusd", "zmm")
// Of 8-bit numbers widened to 16 bits, without the additions.
SY_CHAINS(Int16Dot256, "vpmaddwd", "ymm")
#undef SY_CHAINS
#undef SY_CHAIN
#endif

double Gflops(ThreadPool* pool, void (*chains)(int64_t), double flops_per_instruction) {
  constexpr int64_t kRounds = 1 << 15;
  const double seconds = BestSeconds(pool, [&](int64_t) { chains(kRounds); });
  return 12.0 * flops_per_instruction * kRounds * pool->num_threads() / seconds / 1e9;
}

double L2Bandwidth(ThreadPool* pool) {
  constexpr size_t kBytes = size_t{256} << 10;
  constexpr int kPasses = 64;
  const size_t threads = static_cast<size_t>(pool->num_threads());
  const Buffer buffer(threads * kBytes);
  std::memset(buffer.data(), 1, buffer.bytes());
  std::atomic<uint64_t> sink{0};
  const double seconds = BestSeconds(pool, [&](int64_t thread) {
    uint64_t sum = 0;
    for (int pass = 0; pass < kPasses; ++pass)
      sum += SumWords(buffer.data() + static_cast<size_t>(thread) * kBytes, kBytes);
    sink.fetch_add(sum, std::memory_order_relaxed);
  });
  return static_cast<double>(threads * kBytes * kPasses) / seconds / 1e9;
}

}  // namespace

Ceilings MeasureCeilings(ThreadPool* pool, const std::string& isa, size_t probe_bytes) {
  Ceilings c;
  c.dram_gb_per_s = ProbeReadBandwidth(pool, probe_bytes, 7);
  c.l2_gb_per_s = L2Bandwidth(pool);
#if defined(__x86_64__)
  if (isa == "avx512") {
    c.fma_gflops = Gflops(pool, Fma512, 32);
    c.bf16_dot_gflops = Gflops(pool, Bf16Dot512, 64);
    c.int8_dot_gflops = Gflops(pool, Int8Dot512, 128);
  } else if (isa == "avx2") {
    c.fma_gflops = Gflops(pool, Fma256, 16);
    c.int8_dot_gflops = Gflops(pool, Int16Dot256, 32);
  }
#endif
  return c;
}

}  // namespace switchyard
