#include "kernels/cpu/packing.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "kernels/cpu/half.h"

namespace switchyard::cpu {
namespace {

// One panel of a slab.
struct Panel {
  std::byte* slab;
  int64_t width;  // of the slab
  int64_t at;     // in the slab
  int64_t columns;
};

void PackF32(const float* w, const Panel& panel, int64_t k) {
  float* out = reinterpret_cast<float*>(panel.slab) + panel.at * kPanelColumns;
  for (int64_t i = 0; i < k; ++i, out += panel.width * kPanelColumns) {
    for (int64_t j = 0; j < kPanelColumns; ++j) out[j] = j < panel.columns ? w[j * k + i] : 0.0f;
  }
}

// A pair of neighbours along k moves as one 32-bit word.
void PackBf16(const bf16* w, const Panel& panel, int64_t k) {
  static_assert(std::endian::native == std::endian::little);
  uint32_t* out = reinterpret_cast<uint32_t*>(panel.slab) + panel.at * kPanelColumns;
  for (int64_t i = 0; i < k; i += 2, out += panel.width * kPanelColumns) {
    const size_t bytes = i + 1 < k ? 4 : 2;
    for (int64_t j = 0; j < kPanelColumns; ++j) {
      out[j] = 0;
      if (j < panel.columns) std::memcpy(&out[j], &w[j * k + i], bytes);
    }
  }
}

// A panel of a quantised slab. Starts with zeros everywhere.
class QuantizedPanel {
 public:
  QuantizedPanel(const Panel& panel, int64_t k, const WeightFormat& format)
      : format_(format), panel_(panel) {
    for (int64_t k0 = 0; k0 < k; k0 += format.group) {
      std::memset(Scales(k0), 0, 2 * kPanelColumns);
      if (format.zero_points) std::memset(Zeros(k0), 0, kPanelColumns);
      for (int64_t i = k0; i < std::min(k, k0 + format.group); i += inputs())
        std::memset(Step(i), 0, 64);
      if (panel.at + 1 == panel.width) ClearGaps(Group(k0));
    }
  }
  int64_t columns() const { return panel_.columns; }
  const WeightFormat& format() const { return format_; }
  // Of the group of input k.
  uint16_t* Scales(int64_t k) const {
    return reinterpret_cast<uint16_t*>(Group(k)) + panel_.at * kPanelColumns;
  }
  uint8_t* Zeros(int64_t k) const {
    return reinterpret_cast<uint8_t*>(Group(k)) + ZerosOffset(panel_.width) +
           panel_.at * kPanelColumns;
  }
  // The codes of input k, one per column.
  void PutInput(int64_t k, const uint8_t* codes) const {
    uint8_t* out = Step(k) + k % 4;
    const bool is_int8 = format_.type == WeightType::kInt8;
    const int shift = is_int8 || k % 8 < 4 ? 0 : 4;
    for (int64_t j = 0; j < panel_.columns; ++j) {
      out[4 * j] = static_cast<uint8_t>(
          is_int8 ? codes[j] : out[4 * j] | static_cast<uint8_t>((codes[j] & 15) << shift));
    }
  }

 private:
  // What a slab of few panels leaves unused, so that equal weights are equal bytes.
  void ClearGaps(std::byte* group) const {
    const auto clear = [group](int64_t begin, int64_t end) {
      std::memset(group + begin, 0, static_cast<size_t>(end - begin));
    };
    const int64_t zeros = ZerosOffset(panel_.width);
    clear(panel_.width * 2 * kPanelColumns, zeros);
    if (format_.zero_points)
      clear(zeros + panel_.width * kPanelColumns, CodesOffset(panel_.width, format_));
  }
  int64_t inputs() const { return format_.type == WeightType::kInt8 ? 4 : 8; }
  std::byte* Group(int64_t k) const {
    return panel_.slab + SlabBytes(panel_.width, k / format_.group * format_.group, format_);
  }
  // The panel's codes of the step that holds input k.
  uint8_t* Step(int64_t k) const {
    return reinterpret_cast<uint8_t*>(Group(k)) + CodesOffset(panel_.width, format_) +
           (k % format_.group / inputs() * panel_.width + panel_.at) * 64;
  }
  const WeightFormat format_;
  const Panel panel_;
};

template <typename T>
void QuantizeColumns(const KernelTable& kernels, const T* w, int64_t k,
                     const QuantizedPanel& panel) {
  alignas(64) std::array<float, kActGroup * kPanelColumns> weights{};  // [input][column]
  std::array<uint8_t, kActGroup * kPanelColumns> codes;
  std::array<uint16_t, kPanelColumns> scales;
  for (int64_t k0 = 0; k0 < k; k0 += panel.format().group) {
    const int64_t count = std::min<int64_t>(panel.format().group, k - k0);
    for (int64_t j = 0; j < panel.columns(); ++j) {
      const T* column = w + j * k + k0;
      for (int64_t i = 0; i < count; ++i)
        weights[static_cast<size_t>(i * kPanelColumns + j)] = ToFloat(column[i]);
    }
    kernels.quantize_weights(weights.data(), count, panel.format().type, scales.data(),
                             codes.data());
    std::copy_n(scales.data(), panel.columns(), panel.Scales(k0));
    for (int64_t i = 0; i < count; ++i) panel.PutInput(k0 + i, codes.data() + i * kPanelColumns);
  }
}

void CopyColumns(const QuantizedTensor& w, int64_t first, const QuantizedPanel& panel) {
  const int64_t source_group = std::min<int64_t>(w.format.group, w.k);
  const int64_t source_groups = CeilDiv(w.k, source_group);
  std::array<uint8_t, kPanelColumns> codes{};
  for (int64_t k = 0; k < w.k; ++k) {
    for (int64_t j = 0; j < panel.columns(); ++j)
      codes[static_cast<size_t>(j)] = w.codes[static_cast<size_t>((first + j) * w.k + k)];
    panel.PutInput(k, codes.data());
  }
  for (int64_t j = 0; j < panel.columns(); ++j) {
    for (int64_t k0 = 0; k0 < w.k; k0 += panel.format().group) {
      const size_t from = static_cast<size_t>((first + j) * source_groups + k0 / source_group);
      panel.Scales(k0)[j] = HalfFromFloat(w.scales[from]);
      if (panel.format().zero_points) panel.Zeros(k0)[j] = w.zeros[from];
    }
  }
}

// Fills every panel: fill(source, its first column, panel).
template <typename Fill>
void ForPanels(ThreadPool* pool, int64_t num_sources, int64_t n, const PackedMatrix& packed,
               const Fill& fill) {
  const int64_t num_panels = NumPanels(n) * num_sources;
  pool->ParallelFor(num_panels, [&](int64_t panel) {
    const int64_t column = panel / num_sources * kPanelColumns;
    fill(static_cast<size_t>(panel % num_sources), column,
         Panel{.slab = packed.storage.data() + SlabBegin(panel, packed.k, packed.format),
               .width = SlabWidth(panel, num_panels),
               .at = panel % kSlabPanels,
               .columns = std::min(kPanelColumns, n - column)});
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
  packed.storage = Buffer(MatrixBytes(NumPanels(n) * num_sources, k, format));
  return packed;
}

PackedMatrix PackPanels(const KernelTable& kernels, ThreadPool* pool,
                        std::span<const Tensor> sources, const WeightFormat& format) {
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
  ForPanels(pool, num_sources, n, packed, [&](size_t source, int64_t column, const Panel& panel) {
    const Tensor& t = sources[source];
    if (IsQuantized(format)) {
      const QuantizedPanel out(panel, k, format);
      if (is_bf16) {
        QuantizeColumns(kernels, t.as<bf16>() + column * k, k, out);
      } else {
        QuantizeColumns(kernels, t.as<float>() + column * k, k, out);
      }
    } else if (is_bf16) {
      PackBf16(t.as<bf16>() + column * k, panel, k);
    } else {
      PackF32(t.as<float>() + column * k, panel, k);
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
  ForPanels(pool, num_sources, first.n, packed,
            [&](size_t source, int64_t column, const Panel& panel) {
              CopyColumns(sources[source], column, QuantizedPanel(panel, first.k, format));
            });
  return packed;
}

}  // namespace switchyard::cpu
