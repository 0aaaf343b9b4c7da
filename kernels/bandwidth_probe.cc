#include "kernels/bandwidth_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace switchyard {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;

uint64_t* Chunk(const Buffer& buffer, int64_t i) {
  return reinterpret_cast<uint64_t*>(buffer.data() + static_cast<size_t>(i) * kChunkBytes);
}

}  // namespace

uint64_t SumWords(const std::byte* data, size_t bytes) {
  constexpr size_t kLineWords = 8;
  constexpr size_t kAheadWords = 1024;
  const uint64_t* words = reinterpret_cast<const uint64_t*>(data);
  uint64_t sums[kLineWords] = {};
  for (size_t i = 0; i < bytes / 8; i += kLineWords) {
    __builtin_prefetch(words + i + kAheadWords, 0, 2);  // into L2
    for (size_t j = 0; j < kLineWords; ++j) sums[j] += words[i + j];
  }
  uint64_t sum = 0;
  for (uint64_t s : sums) sum += s;
  return sum;
}

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
    sum.fetch_add(SumWords(buffer_.data() + static_cast<size_t>(i) * kChunkBytes, kChunkBytes),
                  std::memory_order_relaxed);
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
