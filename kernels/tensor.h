// Tensor: a non-owning, row-major view of typed memory. Buffer: its owner, 64-byte aligned, on the
// host; large ones ask for huge pages. Header-only and free of other includes of ours: comm/
// includes it too. Neither is thread-safe; a view must not outlive its owner.
#pragma once

#include <sys/mman.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <span>

#include "kernels/check.h"

namespace switchyard {

enum class DType : uint8_t { kF32, kBF16, kI32 };

constexpr size_t DTypeSize(DType t) { return t == DType::kBF16 ? 2 : 4; }
constexpr const char* DTypeName(DType t) {
  return t == DType::kF32 ? "float32" : t == DType::kBF16 ? "bfloat16" : "int32";
}

// bfloat16: the upper half of a float32, rounded to nearest even.
struct bf16 {
  uint16_t bits;
};
inline float ToFloat(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float ToFloat(float v) { return v; }
inline bf16 ToBF16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<uint16_t>((u >> 16) | 0x40)};  // NaN stays NaN
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::kI32;
};

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int ndim = 0;
  std::array<int64_t, 4> shape{};

  Tensor() = default;
  Tensor(void* d, DType t, std::initializer_list<int64_t> dims)
      : data(d), dtype(t), ndim(static_cast<int>(dims.size())) {
    SY_CHECK_LE(dims.size(), 4u);
    int i = 0;
    for (int64_t n : dims) shape[static_cast<size_t>(i++)] = n;
  }
  int64_t dim(int i) const { return shape[static_cast<size_t>(i)]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= dim(i);
    return n;
  }
  size_t bytes() const { return static_cast<size_t>(numel()) * DTypeSize(dtype); }
  template <typename T>
  T* as() const {
    SY_CHECK(DTypeOf<T>::value == dtype);
    return static_cast<T*>(data);
  }
};

class Buffer {
 public:
  // When its pages are taken from the system, which costs 0.1 ms for 1 MB: as they are first
  // written, or at once. Large ones always wait: what is computed in them takes far longer.
  enum class Pages : uint8_t { kWhenWritten, kNow };
  static constexpr size_t kMaxPagesNow = size_t{32} << 20;

  Buffer() = default;
  explicit Buffer(size_t bytes, Pages pages = Pages::kWhenWritten) : bytes_(bytes) {
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t rounded = (bytes + 63) / 64 * 64;
    const bool huge = bytes >= kHugePage;
    if (rounded == 0) return;
    void* data = nullptr;  // not aligned_alloc, which takes multiples of the alignment alone
    SY_CHECK_EQ(posix_memalign(&data, huge ? kHugePage : 64, rounded), 0);
    data_.reset(data);
    // Only whole huge pages, so that no more memory is used than asked for. A refusal costs speed
    // alone.
    if (huge) (void)madvise(data_.get(), bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
    if (pages == Pages::kNow && bytes <= kMaxPagesNow) std::memset(data, 0, bytes);
  }
  std::byte* data() const { return static_cast<std::byte*>(data_.get()); }
  size_t bytes() const { return bytes_; }
  Tensor View(DType t, std::initializer_list<int64_t> dims) const {
    Tensor view(data_.get(), t, dims);
    SY_CHECK_LE(view.bytes(), bytes_);
    return view;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t bytes_ = 0;
};

}  // namespace switchyard
