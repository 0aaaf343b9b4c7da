// The words of several rows side by side, as the tiles of a matrix product read them: word i of row
// r goes to out[i * rows + r]. Vectors of the compiler serve all instruction paths.
#pragma once

#include "kernels/cpu/simd.h"

namespace switchyard::SY_CPU_PATH {

typedef uint32_t Words8 __attribute__((vector_size(32)));
// In memory, of any type and alignment.
typedef uint32_t WordInMemory __attribute__((may_alias));
typedef uint32_t Words8InMemory __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint16_t Halves8InMemory __attribute__((vector_size(16), aligned(1), may_alias));

// Eight words of a row: kWordBytes = 4 as they lie, 2 bfloat16 widened to float32.
template <int kWordBytes>
SY_INLINE void LoadWords(const std::byte* p, Words8* out) {
  if constexpr (kWordBytes == 4) {
    *out = *reinterpret_cast<const Words8InMemory*>(p);
  } else {
    *out = __builtin_convertvector(*reinterpret_cast<const Halves8InMemory*>(p), Words8) << 16;
  }
}
SY_INLINE void StoreWords(const Words8& v, void* p) { *reinterpret_cast<Words8InMemory*>(p) = v; }
template <int kWordBytes>
SY_INLINE uint32_t LoadWord(const std::byte* p) {
  uint32_t word = 0;
  __builtin_memcpy(&word, p, kWordBytes);
  return kWordBytes == 4 ? word : word << 16;
}

constexpr int kMaxInterleaved = 16;  // rows at once

// v[i][j] becomes v[j][i].
SY_INLINE void Transpose(Words8 (&v)[8]) {
  Words8 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const Words8 &a = t[i + j], &b = t[i + j + 2];
      v[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      v[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const Words8 a = v[i], b = v[i + 4];
    v[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Eight words of up to eight rows, turned: out[j] holds word j of every row.
template <int kWordBytes>
SY_INLINE void LoadTurned(const std::byte* x, int64_t row_bytes, int64_t rows, Words8 (&out)[8]) {
  for (int r = 0; r < 8; ++r)
    LoadWords<kWordBytes>(x + (r < rows ? r : 0) * row_bytes, &out[r]);  // any, where there is none
  Transpose(out);
}

// rows: 1 … kMaxInterleaved, row_bytes apart. Writes words * rows words and nothing else.
template <int kWordBytes>
SY_INLINE void Interleave(const void* x, int64_t row_bytes, int64_t rows, int64_t words,
                          uint32_t* out) {
  const std::byte* const begin = static_cast<const std::byte*>(x);
  WordInMemory* to = out;
  int64_t i = 0;
  for (; rows == 1 && i + 8 <= words; i += 8, to += 8) {
    Words8 v;
    LoadWords<kWordBytes>(begin + i * kWordBytes, &v);
    StoreWords(v, to);
  }
  for (; rows >= 4 && i + 8 <= words; i += 8, to += 8 * rows) {
    const std::byte* const at = begin + i * kWordBytes;
    const int64_t more = rows - 8;
    Words8 v[8], w[8];
    LoadTurned<kWordBytes>(at, row_bytes, rows, v);
    if (more > 0) LoadTurned<kWordBytes>(at + 8 * row_bytes, row_bytes, more, w);
    // Of every store but the last one, words past `rows` are overwritten by the next.
    for (int j = 0; j < 7; ++j) {
      StoreWords(v[j], to + j * rows);
      if (more > 0) StoreWords(w[j], to + j * rows + 8);
    }
    for (int64_t r = 0; r < rows; ++r) to[7 * rows + r] = r < 8 ? v[7][r] : w[7][r - 8];
  }
  for (; i < words; ++i)
    for (int64_t r = 0; r < rows; ++r)
      *to++ = LoadWord<kWordBytes>(begin + r * row_bytes + i * kWordBytes);
}

}  // namespace switchyard::SY_CPU_PATH
