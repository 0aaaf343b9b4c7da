// Exp and Log in double precision from +, -, *, / and bit moves alone, so that they give the same
// bits on every CPU and C library (libm chooses its code by CPU). Accurate to about 1e-15 relative.
// Pure functions.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace switchyard {

inline constexpr double kLn2High = 6.93147180369123816490e-01;
inline constexpr double kLn2Low = 1.90821492927058770002e-10;

// e^x; 0 below -708, infinity above 709, NaN stays NaN.
inline double ExactExp(double x) {
  if (x != x) return x;
  if (x > 709.0) return std::numeric_limits<double>::infinity();
  if (x < -708.0) return 0.0;
  const double scaled = x * 1.44269504088896338700e+00;
  const int64_t n = static_cast<int64_t>(scaled + (scaled < 0 ? -0.5 : 0.5));
  const double r = (x - static_cast<double>(n) * kLn2High) - static_cast<double>(n) * kLn2Low;
  double p = 1.0;  // Taylor by Horner; |r| <= 0.35, so the term after r^13 is below 1e-17
  for (int i = 13; i >= 1; --i) p = 1.0 + p * r / i;
  return p * std::bit_cast<double>(static_cast<uint64_t>(n + 1023) << 52);
}

// ln x. REQUIRES: x is a positive normal number.
inline double ExactLog(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
  double m = std::bit_cast<double>((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);  // [1, 2)
  if (m > 1.41421356237309504880) {
    m *= 0.5;
    ++exponent;
  }
  const double s = (m - 1.0) / (m + 1.0);  // ln m = 2 atanh s, |s| <= 0.172
  const double s2 = s * s;
  double p = 0.0;
  for (int i = 23; i >= 1; i -= 2) p = p * s2 + 1.0 / i;
  const double e = static_cast<double>(exponent);
  return e * kLn2High + (2.0 * s * p + e * kLn2Low);
}

}  // namespace switchyard
