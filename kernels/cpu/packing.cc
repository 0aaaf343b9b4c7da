#include "kernels/cpu/packing.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/quantize.h"

namespace switchyard::cpu {
namespace {

void PackF32(const float* w, int64_t columns, int64_t k, float* out) {
  for (int64_t i = 0; i < k; ++i, out += kPanelColumns) {
    for (int64_t j = 0; j < kPanelColumns; ++j) out[j] = j < columns ? w[j * k + i] : 0.0f;
  }
}

// A pair of neighbours along k moves as one 32-bit word.
void PackBf16(const bf16* w, int64_t columns, int64_t k, uint32_t* out) {
  static_assert(std::endian::native == std::endian::little);
  for (int64_t i = 0; i < k; i += 2, out += kPanelColumns) {
    const size_t bytes = i + 1 < k ? 4 : 2;
    for (int64_t j = 0; j < kPanelColumns; ++j) {
      out[j] = 0;
      if (j < columns) std::memcpy(&out[j], &w[j * k + i], bytes);
    }
  }
}

// The parts of one quantised panel.
struct QuantizedPanel {
  QuantizedPanel(std::byte* panel, int64_t k, const WeightFormat& f)
      : format(f),
        scales(reinterpret_cast<uint16_t*>(panel)),
        zeros(reinterpret_cast<uint8_t*>(panel + ZerosOffset(k, f))),
        codes(reinterpret_cast<uint8_t*>(panel + CodesOffset(k, f))) {
    std::memset(panel, 0, PanelBytes(k, f));
  }
  // `from` are the codes of inputs k0, … of one column.
  void Put(int64_t column, int64_t k0, std::span<const uint8_t> from) const {
    for (size_t i = 0; i < from.size(); ++i) {
      const int64_t k = k0 + static_cast<int64_t>(i);
      if (format.type == WeightType::kInt8) {
        codes[k / 4 * 64 + column * 4 + k % 4] = from[i];
      } else {
        codes[k / 8 * 64 + column * 4 + k % 4] |=
            static_cast<uint8_t>((from[i] & 15) << (k % 8 < 4 ? 0 : 4));
      }
    }
  }
  WeightFormat format;
  uint16_t* scales;  // [groups][16]
  uint8_t* zeros;    // [groups][16]
  uint8_t* codes;
};

template <typename T>
void QuantizePanel(const T* w, int64_t columns, int64_t k, const QuantizedPanel& panel) {
  std::array<float, kActGroup> weights;
  std::array<uint8_t, kActGroup> codes;
  for (int64_t j = 0; j < columns; ++j, w += k) {
    for (int64_t k0 = 0; k0 < k; k0 += panel.format.group) {
      const size_t count = static_cast<size_t>(std::min<int64_t>(panel.format.group, k - k0));
      for (size_t i = 0; i < count; ++i) weights[i] = ToFloat(w[k0 + static_cast<int64_t>(i)]);
      panel.scales[k0 / panel.format.group * kPanelColumns + j] =
          QuantizeGroup({weights.data(), count}, panel.format.type, codes.data());
      panel.Put(j, k0, {codes.data(), count});
    }
  }
}

void CopyPanel(const QuantizedTensor& w, int64_t first, int64_t columns,
               const QuantizedPanel& panel) {
  const int64_t source_group = std::min<int64_t>(w.format.group, w.k);
  const int64_t source_groups = CeilDiv(w.k, source_group);
  for (int64_t j = 0; j < columns; ++j) {
    panel.Put(j, 0,
              w.codes.subspan(static_cast<size_t>((first + j) * w.k), static_cast<size_t>(w.k)));
    for (int64_t k0 = 0; k0 < w.k; k0 += panel.format.group) {
      const size_t from = static_cast<size_t>((first + j) * source_groups + k0 / source_group);
      const int64_t to = k0 / panel.format.group * kPanelColumns + j;
      panel.scales[to] = HalfFromFloat(w.scales[from]);
      if (panel.format.zero_points) panel.zeros[to] = w.zeros[from];
    }
  }
}

// Fills every panel: fill(source, its first column, the panel's columns, memory).
template <typename Fill>
void ForPanels(ThreadPool* pool, int64_t num_sources, int64_t n, size_t panel_bytes,
               const PackedMatrix& packed, const Fill& fill) {
  pool->ParallelFor(NumPanels(n) * num_sources, [&](int64_t panel) {
    const int64_t column = panel / num_sources * kPanelColumns;
    fill(static_cast<size_t>(panel % num_sources), column, std::min(kPanelColumns, n - column),
         packed.storage.data() + static_cast<size_t>(panel) * panel_bytes);
  });
}

// Source groups that are neither 32 nor 128 are cut into such.
WeightFormat PackedFormat(const QuantizedTensor& w) {
  const int64_t group = w.format.group;
  SY_CHECK(group >= w.k || group % 32 == 0);
  return {.type = w.format.type,
          .group = group >= w.k || group % kActGroup == 0 ? static_cast<int32_t>(kActGroup) : 32,
          .zero_points = w.format.zero_points};
}

void CheckSource(const QuantizedTensor& w) {
  SY_CHECK(IsQuantized(w.format));
  SY_CHECK_GT(w.format.group, 0);
  const size_t groups =
      static_cast<size_t>(w.n * CeilDiv(w.k, std::min<int64_t>(w.format.group, w.k)));
  SY_CHECK_EQ(w.codes.size(), static_cast<size_t>(w.n * w.k));
  SY_CHECK_EQ(w.scales.size(), groups);
  SY_CHECK_EQ(w.zeros.size(), w.format.zero_points ? groups : 0);
}

}  // namespace

PackedMatrix MakePanels(int64_t n, int64_t k, const WeightFormat& format, int64_t num_sources) {
  PackedMatrix packed;
  packed.n = n * num_sources;
  packed.k = k;
  packed.format = format;
  packed.storage = Buffer(static_cast<size_t>(NumPanels(n) * num_sources) * PanelBytes(k, format));
  return packed;
}

PackedMatrix PackPanels(ThreadPool* pool, std::span<const Tensor> sources,
                        const WeightFormat& format) {
  const Tensor& first = sources.front();
  for (const Tensor& t : sources) {
    SY_CHECK_EQ(t.ndim, 2);
    SY_CHECK(t.dtype == first.dtype && t.dtype != DType::kI32);
    SY_CHECK_EQ(t.dim(0), first.dim(0));
    SY_CHECK_EQ(t.dim(1), first.dim(1));
  }
  SY_CHECK(IsQuantized(format) ? format.group > 0 && !format.zero_points
                               : format == FormatOf(first.dtype));
  const int64_t n = first.dim(0);
  const int64_t k = first.dim(1);
  const bool is_bf16 = first.dtype == DType::kBF16;
  const int64_t num_sources = static_cast<int64_t>(sources.size());
  PackedMatrix packed = MakePanels(n, k, format, num_sources);
  ForPanels(pool, num_sources, n, PanelBytes(k, format), packed,
            [&](size_t source, int64_t column, int64_t columns, std::byte* out) {
              const Tensor& t = sources[source];
              if (IsQuantized(format)) {
                const QuantizedPanel panel(out, k, format);
                if (is_bf16) {
                  QuantizePanel(t.as<bf16>() + column * k, columns, k, panel);
                } else {
                  QuantizePanel(t.as<float>() + column * k, columns, k, panel);
                }
              } else if (is_bf16) {
                PackBf16(t.as<bf16>() + column * k, columns, k, reinterpret_cast<uint32_t*>(out));
              } else {
                PackF32(t.as<float>() + column * k, columns, k, reinterpret_cast<float*>(out));
              }
            });
  return packed;
}

PackedMatrix PackPanels(ThreadPool* pool, std::span<const QuantizedTensor> sources) {
  const QuantizedTensor& first = sources.front();
  for (const QuantizedTensor& t : sources) {
    CheckSource(t);
    SY_CHECK(t.format == first.format);
    SY_CHECK_EQ(t.n, first.n);
    SY_CHECK_EQ(t.k, first.k);
  }
  const WeightFormat format = PackedFormat(first);
  const int64_t num_sources = static_cast<int64_t>(sources.size());
  PackedMatrix packed = MakePanels(first.n, first.k, format, num_sources);
  ForPanels(pool, num_sources, first.n, PanelBytes(first.k, format), packed,
            [&](size_t source, int64_t column, int64_t columns, std::byte* out) {
              CopyPanel(sources[source], column, columns, QuantizedPanel(out, first.k, format));
            });
  return packed;
}

}  // namespace switchyard::cpu
