// Speed of the matrix products beside the machine's own limits, measured in the same run: FMA peak
// from registers and DRAM read bandwidth. Usage: kernels_bench [--threads N] [--isa
// auto|avx512|avx2|portable] [--seconds S]
// [--statistic median|best]; best is for machines that others use at the same time.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/bandwidth_probe.h"
#include "kernels/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  int threads = 2;
  std::string isa = "auto";
  double seconds = 0.5;  // per figure
  bool best = false;     // the fastest run, else the median
};

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Seconds of fn(i), after one warm-up.
template <typename Fn>
double SecondsOf(const Options& options, const Fn& fn) {
  fn(0);
  std::vector<double> times;
  const auto begin = Clock::now();
  for (int i = 1; times.size() < 5 || SecondsSince(begin) < options.seconds; ++i) {
    const auto start = Clock::now();
    fn(i);
    times.push_back(SecondsSince(start));
  }
  if (options.best) return *std::min_element(times.begin(), times.end());
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2),
                   times.end());
  return times[times.size() / 2];
}

// Twelve independent chains of 256-bit FMAs: the AVX2 peak.
__attribute__((target("avx2,fma"))) double FmaChains(int64_t rounds) {
  __m256 acc[12];
  for (__m256& a : acc) a = _mm256_set1_ps(1.0f);
  const __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(0.001f);
  for (int64_t i = 0; i < rounds; ++i)
    for (__m256& a : acc) a = _mm256_fmadd_ps(a, x, y);
  float sum = 0.0f;
  for (const __m256& a : acc) sum += _mm256_cvtss_f32(a);
  return static_cast<double>(sum);
}

double PeakGflops(ThreadPool* pool, const Options& options) {
  constexpr int64_t kRounds = 1 << 14;
  std::vector<double> sums(static_cast<size_t>(pool->num_threads()) * 8);
  const double s = SecondsOf(options, [&](int) {
    pool->ParallelFor(static_cast<int64_t>(sums.size()),
                      [&](int64_t i) { sums[static_cast<size_t>(i)] = FmaChains(kRounds); });
  });
  return static_cast<double>(sums.size()) * kRounds * 12 * 16 / s / 1e9;
}

struct RandomTensor {
  RandomTensor(DType type, int64_t rows, int64_t columns, uint64_t seed)
      : buffer(static_cast<size_t>(rows * columns) * DTypeSize(type)),
        t(buffer.View(type, {rows, columns})) {
    std::mt19937_64 random(seed);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float v = static_cast<float>(random() >> 40) * 0x1p-23f - 1.0f;
      if (type == DType::kBF16) {
        t.as<bf16>()[i] = ToBF16(v * 0.02f);
      } else {
        t.as<float>()[i] = v * 0.02f;
      }
    }
  }
  Buffer buffer;
  Tensor t;
};

struct Limits {
  double gflops = 0.0;
  double gbs = 0.0;
};

void PrintRow(const char* what, DType type, int64_t rows, double s, double flops, double bytes,
              const Limits& limits) {
  const double gflops = flops / s / 1e9, gbs = bytes / s / 1e9;
  std::printf("%-10s %-8s rows %4lld  %9.1f us  %7.1f GFLOP/s (%3.0f %%)  %6.1f GB/s (%3.0f %%)\n",
              what, DTypeName(type), static_cast<long long>(rows), s * 1e6, gflops,
              100 * gflops / limits.gflops, gbs, 100 * gbs / limits.gbs);
}

// y = x W^T at hidden x hidden, over enough matrices to leave the caches.
void BenchMatmul(ComputeBackend& backend, DType type, const Options& options,
                 const Limits& limits) {
  constexpr int64_t kHidden = 2048, kMatrices = 24;
  std::vector<PackedMatrix> w;
  {
    const RandomTensor dense(type, kHidden, kHidden, 1);
    for (int i = 0; i < kMatrices; ++i) w.push_back(backend.Pack(dense.t, FormatOf(type)));
  }
  for (int64_t rows : {1, 2, 4, 6, 8, 16, 64, 512}) {
    const RandomTensor x(type, rows, kHidden, 2), out(type, rows, kHidden, 3);
    const double s = SecondsOf(options, [&](int i) {
      backend.Matmul(x.t, w[static_cast<size_t>(i % kMatrices)], nullptr, out.t);
    });
    PrintRow("matmul", type, rows, s, 2.0 * static_cast<double>(rows * kHidden * kHidden),
             static_cast<double>(w[0].storage.bytes()), limits);
  }
}

// One MoE layer of OLMoE-1B-7B's shape, each row to 8 of 64 experts at random.
void BenchMoe(ComputeBackend& backend, DType type, const Options& options, const Limits& limits) {
  constexpr int64_t kHidden = 2048, kWidth = 1024, kExperts = 64, kTopK = 8;
  std::vector<MlpWeights> experts;
  {
    const RandomTensor gate(type, kWidth, kHidden, 1), up(type, kWidth, kHidden, 2),
        down(type, kHidden, kWidth, 3);
    for (int i = 0; i < kExperts; ++i)
      experts.push_back(backend.PackMlp(gate.t, up.t, down.t, FormatOf(type)));
  }
  const double expert_bytes =
      static_cast<double>(experts[0].gate_up.storage.bytes() + experts[0].down.storage.bytes());
  std::mt19937_64 random(7);
  for (int64_t tokens : {1, 4, 16, 64, 512}) {
    const RandomTensor x(type, tokens * kTopK, kHidden, 4), out(type, tokens * kTopK, kHidden, 5);
    // Several routings, so that batch 1 does not find its experts in the caches.
    std::vector<std::vector<MlpGroup>> routings;
    double used = 0.0;
    for (int i = 0; i < 16; ++i) {
      std::vector<int64_t> rows(kExperts, 0);
      for (int64_t t = 0; t < tokens; ++t) {
        std::vector<int64_t> ids(kExperts);
        for (int64_t e = 0; e < kExperts; ++e) ids[static_cast<size_t>(e)] = e;
        std::shuffle(ids.begin(), ids.end(), random);
        for (int64_t j = 0; j < kTopK; ++j)
          ++rows[static_cast<size_t>(ids[static_cast<size_t>(j)])];
      }
      std::vector<MlpGroup> groups;
      int64_t begin = 0;
      for (int64_t e = 0; e < kExperts; ++e) {
        const int64_t count = rows[static_cast<size_t>(e)];
        if (count == 0) continue;
        groups.push_back(
            {.weights = &experts[static_cast<size_t>(e)], .begin = begin, .end = begin + count});
        begin += count;
      }
      used += static_cast<double>(groups.size()) / 16;
      routings.push_back(std::move(groups));
    }
    const double s = SecondsOf(options, [&](int i) {
      backend.GroupedMlp(x.t, routings[static_cast<size_t>(i % 16)], out.t);
    });
    PrintRow("moe layer", type, tokens, s,
             6.0 * static_cast<double>(tokens * kTopK * kHidden * kWidth), used * expert_bytes,
             limits);
  }
}

int Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--threads") == 0)
      options.threads = std::max(1, std::atoi(argv[i + 1]));
    if (std::strcmp(argv[i], "--isa") == 0) options.isa = argv[i + 1];
    if (std::strcmp(argv[i], "--statistic") == 0) {
      options.best = std::strcmp(argv[i + 1], "best") == 0;
    }
    if (std::strcmp(argv[i], "--seconds") == 0) options.seconds = std::atof(argv[i + 1]);
  }
  ThreadPool pool(options.threads);
  std::string error;
  const auto backend = MakeCpuBackend(&pool, options.isa, &error);
  if (backend == nullptr) {
    std::fprintf(stderr, "%s\n", error.c_str());
    return 1;
  }
  for (DType type : {DType::kF32, DType::kBF16}) {
    Limits limits;
    limits.gflops = CpuIsaPaths().size() > 1 ? PeakGflops(&pool, options) : 0.0;
    limits.gbs = ProbeReadBandwidth(&pool, size_t{512} << 20, 5);
    std::printf("%s, %d threads: AVX2 FMA peak %.1f GFLOP/s, DRAM read %.1f GB/s\n",
                backend->numerics_id().c_str(), options.threads, limits.gflops, limits.gbs);
    BenchMatmul(*backend, type, options, limits);
    BenchMoe(*backend, type, options, limits);
  }
  return 0;
}

}  // namespace
}  // namespace switchyard

int main(int argc, char** argv) { return switchyard::Main(argc, argv); }
