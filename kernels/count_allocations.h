// For tests: counts every allocation of a binary. Include it in one source file of the binary.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace switchyard {

inline std::atomic<int64_t> num_allocations{0};
inline thread_local bool count_allocations = true;  // of this thread

inline void* CountedAllocation(size_t bytes) {
  if (count_allocations) num_allocations.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(bytes == 0 ? 1 : bytes);
}

}  // namespace switchyard

// Not inlined: the compiler would see only one half of a pair.
[[gnu::noinline]] void* operator new(size_t bytes) {
  void* p = switchyard::CountedAllocation(bytes);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
// What the library's stable_sort calls: it would be the sanitizer's own.
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return switchyard::CountedAllocation(bytes);
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }
