#include "kernels/bandwidth_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace switchyard {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;

// Four streams at once with prefetch: one stream alone leaves a fifth of the bandwidth unused.
uint64_t SumChunk(const uint64_t* words) {
  constexpr size_t kStreams = 4;
  constexpr size_t kLineWords = 8;
  constexpr size_t kAheadWords = 128;
  constexpr size_t kStreamWords = kChunkBytes / 8 / kStreams;
  uint64_t sums[kLineWords] = {};
  for (size_t i = 0; i < kStreamWords; i += kLineWords) {
    for (size_t s = 0; s < kStreams; ++s) {
      const uint64_t* line = words + s * kStreamWords + i;
      __builtin_prefetch(line + kAheadWords);
      for (size_t j = 0; j < kLineWords; ++j) sums[j] += line[j];
    }
  }
  uint64_t sum = 0;
  for (uint64_t s : sums) sum += s;
  return sum;
}

uint64_t* Chunk(const Buffer& buffer, int64_t i) {
  return reinterpret_cast<uint64_t*>(buffer.data() + static_cast<size_t>(i) * kChunkBytes);
}

}  // namespace

BandwidthProbe::BandwidthProbe(ThreadPool* pool, size_t bytes)
    : pool_(pool),
      num_chunks_(std::max<size_t>(1, bytes / kChunkBytes)),
      buffer_(num_chunks_ * kChunkBytes) {
  pool_->ParallelFor(static_cast<int64_t>(num_chunks_), [&](int64_t i) {
    uint64_t state = static_cast<uint64_t>(i) + 1;
    uint64_t* words = Chunk(buffer_, i);
    for (size_t j = 0; j < kChunkBytes / 8; ++j) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      words[j] = state;
    }
  });
}

double BandwidthProbe::Sample() {
  std::atomic<uint64_t> sum{0};  // keeps the reads alive
  const auto begin = std::chrono::steady_clock::now();
  pool_->ParallelFor(static_cast<int64_t>(num_chunks_), [&](int64_t i) {
    sum.fetch_add(SumChunk(Chunk(buffer_, i)), std::memory_order_relaxed);
  });
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return static_cast<double>(num_chunks_ * kChunkBytes) / seconds / 1e9;
}

double ProbeReadBandwidth(ThreadPool* pool, size_t bytes, int repetitions) {
  SY_CHECK_GE(repetitions, 1);
  BandwidthProbe probe(pool, bytes);
  probe.Sample();
  std::vector<double> rates;
  for (int r = 0; r < repetitions; ++r) rates.push_back(probe.Sample());
  std::nth_element(rates.begin(), rates.begin() + static_cast<int64_t>(rates.size() / 2),
                   rates.end());
  return rates[rates.size() / 2];
}

}  // namespace switchyard
