#include "worker/rope.h"

#include <cmath>

#include "gtest/gtest.h"

namespace switchyard {
namespace {

RopeConfig Plain(int64_t dim) {
  RopeConfig rope;
  rope.rotary_dim = dim;
  rope.original_max_position = 32;
  return rope;
}

TEST(RopeTest, DefaultFrequencies) {
  const RopeFrequencies f = ComputeRopeFrequencies(Plain(8));
  ASSERT_EQ(f.inv_freq.size(), 4u);
  for (size_t i = 0; i < 4; ++i)
    EXPECT_FLOAT_EQ(f.inv_freq[i],
                    static_cast<float>(std::pow(10000.0, -0.25 * static_cast<double>(i))));
  EXPECT_EQ(f.attention_factor, 1.0f);
}

TEST(RopeTest, LinearDividesEveryFrequency) {
  RopeConfig rope = Plain(8);
  rope.type = RopeType::kLinear;
  rope.factor = 4.0;
  const RopeFrequencies plain = ComputeRopeFrequencies(Plain(8));
  const RopeFrequencies linear = ComputeRopeFrequencies(rope);
  for (size_t i = 0; i < 4; ++i) EXPECT_FLOAT_EQ(linear.inv_freq[i], plain.inv_freq[i] / 4.0f);
}

TEST(RopeTest, Llama3KeepsHighAndDividesLowFrequencies) {
  RopeConfig rope = Plain(64);
  rope.type = RopeType::kLlama3;
  rope.factor = 8.0;
  rope.low_freq_factor = 1.0;
  rope.high_freq_factor = 4.0;
  rope.original_max_position = 8192;
  const RopeFrequencies plain = ComputeRopeFrequencies(Plain(64));
  const RopeFrequencies scaled = ComputeRopeFrequencies(rope);
  EXPECT_EQ(scaled.inv_freq.front(), plain.inv_freq.front());
  EXPECT_FLOAT_EQ(scaled.inv_freq.back(), plain.inv_freq.back() / 8.0f);
  for (size_t i = 1; i < scaled.inv_freq.size(); ++i)
    EXPECT_LT(scaled.inv_freq[i], scaled.inv_freq[i - 1]);
}

TEST(RopeTest, YarnScalesAttention) {
  RopeConfig rope = Plain(24);
  rope.type = RopeType::kYarn;
  rope.factor = 4.0;
  const RopeFrequencies f = ComputeRopeFrequencies(rope);
  EXPECT_FLOAT_EQ(f.attention_factor, static_cast<float>(0.1 * std::log(4.0) + 1.0));
  EXPECT_EQ(f.inv_freq.front(), 1.0f);  // turns often within the trained context: not interpolated
  const RopeFrequencies plain = ComputeRopeFrequencies(Plain(24));
  EXPECT_FLOAT_EQ(f.inv_freq.back(), plain.inv_freq.back() / 4.0f);
}

TEST(RopeTest, TablesHoldScaledCosinesAndSines) {
  const RopeTables tables = MakeRopeTables(Plain(4), 10);
  EXPECT_EQ(tables.cos.dim(0), 10);
  EXPECT_EQ(tables.cos.dim(1), 2);
  EXPECT_EQ(tables.cos.as<float>()[0], 1.0f);
  EXPECT_EQ(tables.sin.as<float>()[1], 0.0f);
  EXPECT_FLOAT_EQ(tables.cos.as<float>()[2 * 9], std::cos(9.0f));
  EXPECT_FLOAT_EQ(tables.sin.as<float>()[2 * 9 + 1], std::sin(0.09f));
}

}  // namespace
}  // namespace switchyard
