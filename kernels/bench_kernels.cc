#include "kernels/bench_kernels.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>

#include "kernels/backend.h"
#include "kernels/bandwidth_probe.h"
#include "kernels/measure.h"
#include "kernels/onednn_matmul.h"
#include "kernels/thread_pool.h"

namespace switchyard {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSampleSeconds = 5e-3;  // of one timing, about
constexpr int kMinRounds = 5;

const WeightFormat kFormats[] = {FormatOf(DType::kBF16), kInt8Weights, kInt4Weights};

struct RandomTensor {
  RandomTensor(DType type, int64_t rows, int64_t columns, uint64_t seed)
      : buffer(static_cast<size_t>(rows * columns) * DTypeSize(type)),
        t(buffer.View(type, {rows, columns})) {
    std::mt19937_64 random(seed);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float v = static_cast<float>(random() >> 40) * 0x1p-23f - 1.0f;
      if (type == DType::kBF16) {
        t.as<bf16>()[i] = ToBF16(v);
      } else {
        t.as<float>()[i] = v;
      }
    }
  }
  Buffer buffer;
  Tensor t;
};

double SecondsOf(const std::function<void()>& fn) {
  const auto begin = Clock::now();
  fn();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// What one row measures.
struct Subject {
  std::string op;
  WeightFormat format;
  int64_t rows = 0;
  double flops = 0;       // of a call
  double bytes = 0;       // of weights that a call reads
  int64_t max_calls = 1;  // of one timing
  std::function<void(int64_t)> ours = {};
  std::function<void(int64_t)> onednn = {};  // may be null
  bool cached = false;
};

class Bench {
 public:
  Bench(const BenchKernelsOptions& options, ThreadPool* pool, ComputeBackend* backend,
        const std::string& isa)
      : options_(options), pool_(pool), backend_(backend), probe_(pool, options.probe_bytes) {
    report_.numerics_id = backend->numerics_id();
    report_.threads = pool->num_threads();
    report_.ceilings = MeasureCeilings(pool, isa, options.probe_bytes);
    report_.onednn_has_bf16 = OneDnnMatmul::Supports(OneDnnType::kBF16);
    num_rows_ = static_cast<int64_t>(std::size(kFormats)) *
                static_cast<int64_t>(std::size(kMatmulRows) + std::size(kCachedRows) +
                                     std::size(kMoeTokens));
  }

  BenchKernelsReport Run() {
    for (const WeightFormat& format : kFormats) {
      Matrices("matmul", format, options_.hidden, options_.num_matrices, kMatmulRows);
      Matrices("matmul cached", format, options_.hidden / 4, 1, kCachedRows);
      MoeLayers(format);
    }
    return std::move(report_);
  }

 private:
  static constexpr int64_t kMatmulRows[] = {1, 4, 8, 16, 64, 512};
  static constexpr int64_t kCachedRows[] = {1, 16};
  static constexpr int64_t kMoeTokens[] = {1, 4, 16, 64};

  // The same bytes at different addresses.
  static PackedMatrix Copy(const PackedMatrix& from) {
    PackedMatrix to = {.n = from.n, .k = from.k, .format = from.format, .storage = {}};
    to.storage = Buffer(from.storage.bytes());
    std::memcpy(to.storage.data(), from.storage.data(), from.storage.bytes());
    return to;
  }

  void Matrices(const char* op, const WeightFormat& format, int64_t hidden, int64_t num_matrices,
                std::span<const int64_t> batches) {
    std::vector<PackedMatrix> w;
    w.push_back(backend_->Pack(RandomTensor(DType::kBF16, hidden, hidden, 1).t, format));
    while (static_cast<int64_t>(w.size()) < num_matrices) w.push_back(Copy(w[0]));
    const bool compare = format.type != WeightType::kInt4;  // oneDNN 2.6 has none
    for (const int64_t rows : batches) {
      const RandomTensor x(DType::kBF16, rows, hidden, 2), out(DType::kF32, rows, hidden, 3);
      std::unique_ptr<OneDnnMatmul> onednn;
      if (compare) {
        const OneDnnMatmul::Shape shape = {.type = format.type != WeightType::kBF16
                                                       ? OneDnnType::kInt8
                                                   : report_.onednn_has_bf16 ? OneDnnType::kBF16
                                                                             : OneDnnType::kF32,
                                           .m = rows,
                                           .n = hidden,
                                           .k = hidden,
                                           .num_weights = num_matrices};
        onednn = std::make_unique<OneDnnMatmul>(shape, pool_->num_threads());
      }
      Subject s = {.op = op,
                   .format = format,
                   .rows = rows,
                   .flops = 2.0 * static_cast<double>(rows * hidden * hidden),
                   .bytes = static_cast<double>(w[0].storage.bytes())};
      s.cached = num_matrices == 1;
      s.max_calls = s.cached ? INT64_MAX : num_matrices;
      s.ours = [&](int64_t i) {
        backend_->Matmul(x.t, w[static_cast<size_t>(i % num_matrices)], nullptr, out.t);
      };
      if (compare) s.onednn = [&](int64_t i) { onednn->Run(i % num_matrices); };
      Measure(s);
    }
  }

  // Rows of experts chosen at random, in several ways, so that few tokens do not find their
  // experts in the caches.
  struct Routing {
    std::vector<MlpGroup> groups;
  };
  std::vector<Routing> Route(int64_t tokens, const std::vector<MlpWeights>& experts) {
    constexpr int kRoutings = 16;
    std::mt19937_64 random(7);
    std::vector<Routing> routings(kRoutings);
    std::vector<size_t> ids(experts.size());
    for (Routing& routing : routings) {
      std::vector<int64_t> rows(experts.size(), 0);
      for (int64_t t = 0; t < tokens; ++t) {
        for (size_t e = 0; e < ids.size(); ++e) ids[e] = e;
        std::shuffle(ids.begin(), ids.end(), random);
        for (size_t j = 0; j < static_cast<size_t>(options_.top_k); ++j) ++rows[ids[j]];
      }
      int64_t begin = 0;
      for (size_t e = 0; e < experts.size(); ++e) {
        if (rows[e] == 0) continue;
        routing.groups.push_back({.weights = &experts[e], .begin = begin, .end = begin + rows[e]});
        begin += rows[e];
      }
    }
    return routings;
  }

  void MoeLayers(const WeightFormat& format) {
    const int64_t hidden = options_.hidden, width = options_.width;
    std::vector<MlpWeights> experts;
    experts.push_back(backend_->PackMlp(RandomTensor(DType::kBF16, width, hidden, 1).t,
                                        RandomTensor(DType::kBF16, width, hidden, 2).t,
                                        RandomTensor(DType::kBF16, hidden, width, 3).t, format));
    while (static_cast<int64_t>(experts.size()) < options_.num_experts) {
      experts.push_back(
          {.gate_up = Copy(experts[0].gate_up), .down = Copy(experts[0].down), .width = width});
    }
    const double expert_bytes =
        static_cast<double>(experts[0].gate_up.storage.bytes() + experts[0].down.storage.bytes());
    for (const int64_t tokens : kMoeTokens) {
      const int64_t rows = tokens * options_.top_k;
      const RandomTensor x(DType::kBF16, rows, hidden, 4), out(DType::kBF16, rows, hidden, 5);
      const std::vector<Routing> routings = Route(tokens, experts);
      double used = 0;
      for (const Routing& r : routings)
        used += static_cast<double>(r.groups.size()) / static_cast<double>(routings.size());
      Subject s = {.op = "moe layer",
                   .format = format,
                   .rows = tokens,
                   .flops = 6.0 * static_cast<double>(rows * hidden * width),
                   .bytes = used * expert_bytes};
      s.max_calls = tokens == 1 ? 4 : 1;
      s.ours = [&](int64_t i) {
        backend_->GroupedMlp(x.t, routings[static_cast<size_t>(i) % routings.size()].groups, out.t);
      };
      Measure(s);
    }
  }

  // Ours, oneDNN and the probe in turn; each round gives ratios of neighbours in time.
  void Measure(const Subject& s) {
    int64_t calls = 0, num_calls = 1;
    const auto timed = [&](const std::function<void(int64_t)>& fn) {
      const double seconds = SecondsOf([&] {
        for (int64_t i = 0; i < num_calls; ++i) fn(calls + i);
      });
      calls += num_calls;
      return seconds / static_cast<double>(num_calls);
    };
    double slower = 0;  // the second call's, of both
    for (int i = 0; i < 2; ++i) {
      slower = timed(s.ours);
      if (!s.onednn) continue;
      slower = std::max(slower, timed(s.onednn));
      OneDnnMatmul::StopThreads();
    }
    num_calls = std::clamp<int64_t>(static_cast<int64_t>(kSampleSeconds / slower), 1, s.max_calls);
    std::vector<double> seconds, probes, shares, ratios;
    const auto begin = Clock::now();
    const double budget = options_.seconds / static_cast<double>(num_rows_);
    while (seconds.size() < kMinRounds ||
           std::chrono::duration<double>(Clock::now() - begin).count() < budget) {
      probes.push_back(s.cached ? report_.ceilings.l2_gb_per_s : probe_.Sample());
      seconds.push_back(timed(s.ours));
      shares.push_back(s.bytes / seconds.back() / 1e9 / probes.back());
      if (!s.onednn) continue;
      s.onednn(calls - 1);  // starts its threads
      ratios.push_back(timed(s.onednn) / seconds.back());
      OneDnnMatmul::StopThreads();
    }
    Add(s, Median(seconds), Median(probes), Median(shares), ratios.empty() ? 0 : Median(ratios),
        static_cast<int>(seconds.size()));
  }

  void Add(const Subject& s, double seconds, double probe, double share, double ratio, int rounds) {
    const Ceilings& c = report_.ceilings;
    const double peak = IsQuantized(s.format)    ? c.int8_dot_gflops
                        : c.bf16_dot_gflops == 0 ? c.fma_gflops
                                                 : c.bf16_dot_gflops;
    const double gflops = s.flops / seconds / 1e9;
    report_.rows.push_back({.op = s.op,
                            .format = WeightFormatName(s.format),
                            .rows = s.rows,
                            .us = seconds * 1e6,
                            .gflops = gflops,
                            .gb_per_s = s.bytes / seconds / 1e9,
                            .probe_gb_per_s = probe,
                            .share_of_compute = peak == 0 ? 0 : gflops / peak,
                            .share_of_probe = share,
                            .onednn_ratio = ratio,
                            .rounds = rounds});
    if (options_.progress) options_.progress(static_cast<int64_t>(report_.rows.size()), num_rows_);
  }

  const BenchKernelsOptions& options_;
  ThreadPool* const pool_;
  ComputeBackend* const backend_;
  BandwidthProbe probe_;
  int64_t num_rows_ = 0;
  BenchKernelsReport report_;
};

}  // namespace

bool BenchKernels(const BenchKernelsOptions& options, BenchKernelsReport* report,
                  std::string* error) {
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  ThreadPool pool(options.threads == 0 ? cores : options.threads);
  const auto backend = MakeCpuBackend(&pool, options.isa, error);
  if (backend == nullptr) return false;
  const std::string isa = options.isa == "auto" ? CpuIsaPaths().front() : options.isa;
  *report = Bench(options, &pool, backend.get(), isa).Run();
  return true;
}

}  // namespace switchyard
