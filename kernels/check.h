// CHECK macros for our own bugs: print the expression and the values, then abort. The rest of the
// cluster treats the process as a dead peer. A user's input must never reach one of these; use
// absl::Status for that.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

namespace switchyard::internal {

[[noreturn]] inline void CheckFailed(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "CHECK failed at %s:%d: %s\n", file, line, what.c_str());
  std::fflush(stderr);
  std::abort();
}

template <typename A, typename B>
[[noreturn]] void CheckOpFailed(const char* file, int line, const char* expr, const A& a,
                                const B& b) {
  std::ostringstream out;
  out << expr << " (" << a << " vs " << b << ")";
  CheckFailed(file, line, out.str());
}

}  // namespace switchyard::internal

#define SY_CHECK(cond)                                                \
  do {                                                                \
    if (!(cond)) [[unlikely]]                                         \
      ::switchyard::internal::CheckFailed(__FILE__, __LINE__, #cond); \
  } while (0)

#define SY_CHECK_OP(a, op, b)                                                                   \
  do {                                                                                          \
    const auto& sy_a = (a);                                                                     \
    const auto& sy_b = (b);                                                                     \
    if (!(sy_a op sy_b)) [[unlikely]]                                                           \
      ::switchyard::internal::CheckOpFailed(__FILE__, __LINE__, #a " " #op " " #b, sy_a, sy_b); \
  } while (0)

#define SY_CHECK_EQ(a, b) SY_CHECK_OP(a, ==, b)
#define SY_CHECK_NE(a, b) SY_CHECK_OP(a, !=, b)
#define SY_CHECK_LE(a, b) SY_CHECK_OP(a, <=, b)
#define SY_CHECK_LT(a, b) SY_CHECK_OP(a, <, b)
#define SY_CHECK_GE(a, b) SY_CHECK_OP(a, >=, b)
#define SY_CHECK_GT(a, b) SY_CHECK_OP(a, >, b)
