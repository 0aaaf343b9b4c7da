// Interleave: every number of rows and words, of both word sizes, and nothing written besides. The
// paths use fewer rows than it takes, so it is compiled here for one more "path".
#include "kernels/cpu/interleave.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace switchyard::SY_CPU_PATH {
namespace {

constexpr uint32_t kGuard = 0xdeadbeef;

template <int kWordBytes>
void TestAll() {
  for (int64_t rows = 1; rows <= kMaxInterleaved; ++rows) {
    for (int64_t words = 0; words <= 40; ++words) {
      const int64_t row_bytes = words * kWordBytes + 6;  // unaligned rows
      std::vector<std::byte> x(static_cast<size_t>(rows * row_bytes));
      for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::byte>(i * 37 + 11);
      std::vector<uint32_t> out(static_cast<size_t>(rows * words + 16), kGuard);
      Interleave<kWordBytes>(x.data(), row_bytes, rows, words, out.data() + 8);
      for (size_t i = 0; i < 8; ++i) {
        ASSERT_EQ(out[i], kGuard) << rows << " rows, " << words << " words";
        ASSERT_EQ(out[out.size() - 1 - i], kGuard) << rows << " rows, " << words << " words";
      }
      for (int64_t i = 0; i < words; ++i) {
        for (int64_t r = 0; r < rows; ++r) {
          uint32_t word = 0;
          std::memcpy(&word, x.data() + r * row_bytes + i * kWordBytes, kWordBytes);
          if (kWordBytes == 2) word <<= 16;
          ASSERT_EQ(out[static_cast<size_t>(8 + i * rows + r)], word)
              << "word " << i << " of " << words << ", row " << r << " of " << rows;
        }
      }
    }
  }
}

TEST(InterleaveTest, WordsAsTheyLie) { TestAll<4>(); }
TEST(InterleaveTest, Bfloat16Widened) { TestAll<2>(); }

}  // namespace
}  // namespace switchyard::SY_CPU_PATH
