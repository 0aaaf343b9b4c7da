// The packings are those of:
//   fp8: DeepSeek-V3 inference/kernel.py (weight_dequant); vllm quantization/fp8.py
//   compressed-tensors: compressors/{pack_quantized,naive_quantized,mxfp4}
//   gptq: AutoGPTQ nn_modules/qlinear/qlinear_cuda_old.py; GPTQModel for the second format
//   awq: AutoAWQ awq/utils/packing_utils.py
//   mxfp4: transformers integrations/mxfp4.py (convert_moe_packed_tensors)
#include "worker/stored_matrix.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "worker/stored_elements.h"

namespace switchyard {
namespace {

using Shape = std::vector<int64_t>;

// Nibble s of an int32 of AWQ holds column kAwqColumn[s] of its eight.
constexpr std::array<int, 8> kAwqColumn = {0, 2, 4, 6, 1, 3, 5, 7};

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a layout calls its tensors.
struct PartNames {
  const char* codes;
  std::vector<const char*> scales;  // any of them
  const char* zeros;
  const char* input_group;
};
PartNames NamesOf(StoredLayout layout) {
  switch (layout) {
    case StoredLayout::kFp8:
      return {"weight", {"weight_scale_inv", "weight_scale"}, nullptr, nullptr};
    case StoredLayout::kInt8:
      return {"weight", {"weight_scale"}, "weight_zero_point", nullptr};
    case StoredLayout::kPacked:
      return {"weight_packed", {"weight_scale"}, "weight_zero_point", "weight_g_idx"};
    case StoredLayout::kGptq:
      return {"qweight", {"scales"}, "qzeros", "g_idx"};
    case StoredLayout::kAwq:
      return {"qweight", {"scales"}, "qzeros", nullptr};
    case StoredLayout::kMxfp4:
      return {"weight_packed", {"weight_scale"}, nullptr, nullptr};
  }
  SY_CHECK(false);
}

struct Wanted {
  StoredDType dtype;
  Shape shape;
};
Wanted WantedCodes(const StoredMatrix& m) {
  const int64_t pack = 32 / m.scheme.bits;
  switch (m.scheme.layout) {
    case StoredLayout::kFp8:
      return {StoredDType::kF8E4M3, {m.n, m.k}};
    case StoredLayout::kInt8:
      return {StoredDType::kI8, {m.n, m.k}};
    case StoredLayout::kPacked:
      return {StoredDType::kI32, {m.n, CeilDiv(m.k, pack)}};
    case StoredLayout::kGptq:
      return {StoredDType::kI32, {CeilDiv(m.k, pack), m.n}};
    case StoredLayout::kAwq:
      return {StoredDType::kI32, {m.k, CeilDiv(m.n, 8)}};
    case StoredLayout::kMxfp4:
      return {StoredDType::kU8, {m.n, CeilDiv(m.k, 2)}};
  }
  SY_CHECK(false);
}

Wanted WantedZeros(const StoredMatrix& m) {
  const int64_t groups = m.num_groups();
  const int64_t pack = 32 / m.scheme.bits;
  switch (m.scheme.layout) {
    case StoredLayout::kPacked:
      return {StoredDType::kI32, {CeilDiv(m.num_scale_rows(), pack), groups}};
    case StoredLayout::kGptq:
    case StoredLayout::kAwq:
      return {StoredDType::kI32, {groups, CeilDiv(m.n, pack)}};
    default:
      return {StoredDType::kI8, {m.num_scale_rows(), groups}};
  }
}

bool GroupsFirst(StoredLayout layout) {
  return layout == StoredLayout::kGptq || layout == StoredLayout::kAwq;
}

bool ScalesFit(const StoredMatrix& m, const StoredPart& scales) {
  const int64_t rows = m.num_scale_rows();
  const int64_t groups = m.num_groups();
  const bool mx = m.scheme.layout == StoredLayout::kMxfp4;
  const bool exponent =
      scales.dtype == StoredDType::kF8E8M0 || (mx && scales.dtype == StoredDType::kU8);
  if (!exponent && (mx || !IsPlainFloat(scales.dtype))) return false;
  if (GroupsFirst(m.scheme.layout)) return scales.shape == Shape{groups, rows};
  return scales.shape == Shape{rows, groups} || (groups == 1 && scales.shape == Shape{rows}) ||
         (groups == 1 && rows == 1 && scales.shape.empty());
}

absl::Status DoesNotFit(const std::string& name, const StoredPart& part, const std::string& need) {
  return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " is ", part.dtype_name, " ",
                                                 ShapeText(part.shape), " but ", need));
}

const char* Name(StoredDType dtype) {
  switch (dtype) {
    case StoredDType::kF8E4M3:
      return "F8_E4M3";
    case StoredDType::kI8:
      return "I8";
    case StoredDType::kU8:
      return "U8";
    default:
      return "I32";
  }
}

absl::Status CheckPart(const std::string& name, const StoredPart& part, const Wanted& wanted) {
  if (part.dtype == wanted.dtype && part.shape == wanted.shape) return absl::OkStatus();
  return DoesNotFit(
      name, part,
      absl::StrCat("the config needs ", Name(wanted.dtype), " ", ShapeText(wanted.shape)));
}

// The table of groups is the one part whose values are indices.
absl::Status ReadInputGroups(const std::string& name, const StoredPart& part, StoredMatrix* m) {
  if (absl::Status status = CheckPart(name, part, {StoredDType::kI32, {m->k}}); !status.ok())
    return status;
  const auto group_of = [&](int64_t i) { return IntElement(part.bytes.data(), part.dtype, i); };
  bool sorted = true;
  int64_t unset = 0;  // compressed-tensors writes -1 everywhere for "in order"
  for (int64_t i = 0; i < m->k; ++i) {
    sorted = sorted && group_of(i) == (m->scheme.block_cols == 0 ? 0 : i / m->scheme.block_cols);
    unset += group_of(i) == -1 ? 1 : 0;
  }
  for (int64_t i = 0; i < m->k && unset != m->k; ++i) {
    if (group_of(i) >= 0 && group_of(i) < m->num_groups()) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", name, " puts input ", i, " into group ", group_of(i), " of ", m->num_groups()));
  }
  part.file->Release(part.bytes);
  if (!sorted && unset != m->k) m->input_group = part;
  return absl::OkStatus();
}

// weight_shape of compressed-tensors: the shape before packing.
absl::Status CheckShapePart(const std::string& name, const StoredPart& part,
                            const StoredMatrix& m) {
  const bool is_int = part.dtype == StoredDType::kI32 || part.dtype == StoredDType::kI64;
  if (!is_int || part.shape != Shape{2}) return DoesNotFit(name, part, "two integers are needed");
  const int64_t n = IntElement(part.bytes.data(), part.dtype, 0);
  const int64_t k = IntElement(part.bytes.data(), part.dtype, 1);
  if (n == m.n && k == m.k) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " says [", n, ", ", k,
                                                 "] but the config needs [", m.n, ", ", m.k, "]"));
}

// Whether codes and scales of `module` fit `m->scheme`; fills in both.
absl::Status TryScheme(const std::string& module, const FindPart& find, StoredMatrix* m) {
  const PartNames names = NamesOf(m->scheme.layout);
  const std::string codes_name = absl::StrCat(module, ".", names.codes);
  m->codes = find(codes_name);
  if (m->codes.empty()) return absl::NotFoundError(absl::StrCat("no tensor ", codes_name));
  if (absl::Status status = CheckPart(codes_name, m->codes, WantedCodes(*m)); !status.ok())
    return status;
  std::string scales_name;
  for (const char* name : names.scales) {
    scales_name = absl::StrCat(module, ".", name);
    if (m->scales = find(scales_name); !m->scales.empty()) break;
  }
  if (m->scales.empty())
    return absl::InvalidArgumentError(absl::StrCat("tensor ", scales_name, " is missing"));
  if (!ScalesFit(*m, m->scales)) {
    return DoesNotFit(scales_name, m->scales,
                      absl::StrCat("the config needs scales for ", m->num_scale_rows(),
                                   " outputs or blocks of them x ", m->num_groups(), " groups"));
  }
  return absl::OkStatus();
}

absl::Status ReadOtherParts(const std::string& module, const FindPart& find, StoredMatrix* m) {
  const PartNames names = NamesOf(m->scheme.layout);
  if (m->scheme.zero_points) {
    const std::string name = absl::StrCat(module, ".", names.zeros);
    m->zeros = find(name);
    if (m->zeros.empty())
      return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " is missing"));
    // Older compressed-tensors files keep them unpacked.
    const bool unpacked = m->scheme.layout == StoredLayout::kPacked &&
                          m->zeros.dtype == StoredDType::kI8 &&
                          m->zeros.shape == Shape{m->num_scale_rows(), m->num_groups()};
    if (!unpacked) {
      if (absl::Status status = CheckPart(name, m->zeros, WantedZeros(*m)); !status.ok())
        return status;
    }
  } else if (names.zeros != nullptr) {
    find(absl::StrCat(module, ".", names.zeros));  // some writers keep zeros that say nothing
  }
  if (names.input_group != nullptr) {
    const std::string name = absl::StrCat(module, ".", names.input_group);
    const StoredPart groups = find(name);
    if (m->scheme.act_order) {
      if (groups.empty())
        return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " is missing"));
      if (absl::Status status = ReadInputGroups(name, groups, m); !status.ok()) return status;
    }
  }
  if (m->scheme.layout != StoredLayout::kPacked) return absl::OkStatus();
  const std::string shape_name = module + ".weight_shape";
  const StoredPart shape = find(shape_name);
  return shape.empty() ? absl::OkStatus() : CheckShapePart(shape_name, shape, *m);
}

uint8_t CodeOf(uint32_t word, int64_t slot, int bits) {
  return static_cast<uint8_t>((word >> (static_cast<int>(slot) * bits)) & ((1u << bits) - 1));
}

uint32_t Word(const StoredPart& part, int64_t i) {
  uint32_t word;
  std::memcpy(&word, part.bytes.data() + i * 4, 4);
  return word;
}

// Word and slot of output j in a row of AWQ's words.
struct AwqPlace {
  int64_t word;
  int64_t slot;
};
AwqPlace AwqPlaceOf(int64_t j) {
  const auto at = std::find(kAwqColumn.begin(), kAwqColumn.end(), static_cast<int>(j % 8));
  return {j / 8, at - kAwqColumn.begin()};
}

template <typename T>
void Store(float value, T* out);
template <>
void Store(float value, float* out) {
  *out = value;
}
template <>
void Store(float value, bf16* out) {
  *out = ToBF16(value);
}

template <typename T>
void DequantizeTo(const StoredMatrix& m, T* out) {
  constexpr int64_t kTileRows =
      64;  // so that words that run along the outputs are read by the line
  std::array<float, 256> values{};
  for (size_t code = 0; code < values.size(); ++code) {
    const auto byte = static_cast<uint8_t>(code);
    values[code] = m.scheme.layout == StoredLayout::kFp8     ? E4M3ToFloat(byte)
                   : m.scheme.layout == StoredLayout::kMxfp4 ? E2M1ToFloat(byte)
                                                             : static_cast<float>(code);
  }
  const std::vector<float> scales = UnpackScales(m);
  const std::vector<int32_t> zeros = m.is_integer() ? UnpackZeros(m) : std::vector<int32_t>();
  const int64_t groups = m.num_groups();
  std::vector<size_t> group_of(static_cast<size_t>(m.k));
  for (int64_t i = 0; i < m.k; ++i) {
    group_of[static_cast<size_t>(i)] = static_cast<size_t>(
        !m.input_group.empty() ? IntElement(m.input_group.bytes.data(), m.input_group.dtype, i)
                               : (m.scheme.block_cols == 0 ? 0 : i / m.scheme.block_cols));
  }
  std::vector<uint8_t> codes(static_cast<size_t>(kTileRows * m.k));
  for (int64_t begin = 0; begin < m.n; begin += kTileRows) {
    const int64_t end = std::min(m.n, begin + kTileRows);
    UnpackCodes(m, begin, end, codes.data());
    for (int64_t j = begin; j < end; ++j) {
      const int64_t scale_row = m.scheme.block_rows == 0 ? 0 : j / m.scheme.block_rows;
      const float* scale = scales.data() + scale_row * groups;
      const int32_t* zero = zeros.empty() ? nullptr : zeros.data() + scale_row * groups;
      const uint8_t* code = codes.data() + (j - begin) * m.k;
      for (int64_t i = 0; i < m.k; ++i) {
        const size_t g = group_of[static_cast<size_t>(i)];
        float value = values[code[i]];
        if (zero != nullptr) value -= static_cast<float>(zero[g]);
        Store(scale[g] * value, out + j * m.k + i);
      }
    }
  }
}

}  // namespace

int64_t StoredMatrix::num_groups() const {
  return scheme.block_cols == 0 ? 1 : CeilDiv(k, scheme.block_cols);
}

int64_t StoredMatrix::num_scale_rows() const {
  return scheme.block_rows == 0 ? 1 : CeilDiv(n, scheme.block_rows);
}

int64_t StoredMatrix::stored_bytes() const {
  return static_cast<int64_t>(codes.bytes.size() + scales.bytes.size() + zeros.bytes.size() +
                              input_group.bytes.size());
}

bool StoredMatrix::is_integer() const {
  return scheme.layout != StoredLayout::kFp8 && scheme.layout != StoredLayout::kMxfp4;
}

absl::StatusOr<std::optional<StoredMatrix>> FindStoredMatrix(const std::string& module, int64_t n,
                                                             int64_t k,
                                                             const StoredQuantization& quantization,
                                                             const FindPart& find) {
  absl::Status worst = absl::OkStatus();
  for (const StoredScheme& scheme : quantization.schemes) {
    StoredMatrix matrix{.scheme = scheme, .n = n, .k = k};
    absl::Status status = TryScheme(module, find, &matrix);
    if (status.ok()) status = ReadOtherParts(module, find, &matrix);
    if (status.ok()) return matrix;
    if (!absl::IsNotFound(status)) worst = status;
  }
  if (!worst.ok()) return worst;
  return std::nullopt;
}

absl::StatusOr<std::optional<StoredMatrix>> FindFusedMxfp4(const FusedRows& place, int64_t n,
                                                           int64_t k, const FindPart& find) {
  StoredPart blocks = find(place.name + "_blocks");
  if (blocks.empty()) return std::nullopt;
  StoredPart scales = find(place.name + "_scales");
  if (scales.empty())
    return absl::InvalidArgumentError(absl::StrCat("tensor ", place.name, "_scales is missing"));
  const int64_t groups = CeilDiv(k, 32);
  if (absl::Status status =
          k % 32 == 0 ? CheckPart(place.name + "_blocks", blocks,
                                  {StoredDType::kU8, {place.experts, place.rows, groups, 16}})
                      : DoesNotFit(place.name + "_blocks", blocks,
                                   absl::StrCat(k, " inputs are not whole blocks of 32"));
      !status.ok()) {
    return status;
  }
  if (absl::Status status = CheckPart(place.name + "_scales", scales,
                                      {StoredDType::kU8, {place.experts, place.rows, groups}});
      !status.ok()) {
    return status;
  }
  const size_t first = static_cast<size_t>(place.expert * place.rows + place.row);
  const size_t rows = static_cast<size_t>(n);
  const size_t g = static_cast<size_t>(groups);
  blocks.bytes = blocks.bytes.subspan(first * g * 16, rows * g * 16);
  scales.bytes = scales.bytes.subspan(first * g, rows * g);
  return StoredMatrix{.scheme = {.layout = StoredLayout::kMxfp4, .bits = 4, .block_cols = 32},
                      .n = n,
                      .k = k,
                      .codes = blocks,
                      .scales = scales};
}

void UnpackCodes(const StoredMatrix& m, int64_t begin, int64_t end, uint8_t* out) {
  const int bits = m.scheme.bits;
  const int64_t pack = 32 / bits;
  const auto* bytes = reinterpret_cast<const uint8_t*>(m.codes.bytes.data());
  switch (m.scheme.layout) {
    case StoredLayout::kFp8:
      std::memcpy(out, bytes + begin * m.k, static_cast<size_t>((end - begin) * m.k));
      return;
    case StoredLayout::kInt8:  // signed in the file
      for (int64_t i = begin * m.k; i < end * m.k; ++i)
        *out++ = static_cast<uint8_t>(bytes[i] ^ 0x80);
      return;
    case StoredLayout::kMxfp4:
      for (int64_t j = begin; j < end; ++j) {
        const uint8_t* row = bytes + j * CeilDiv(m.k, 2);
        for (int64_t i = 0; i < m.k; ++i)
          *out++ = static_cast<uint8_t>((i % 2 == 0 ? row[i / 2] : row[i / 2] >> 4) & 15);
      }
      return;
    case StoredLayout::kPacked:
      for (int64_t j = begin; j < end; ++j) {
        for (int64_t i = 0; i < m.k; ++i)
          *out++ = CodeOf(Word(m.codes, j * CeilDiv(m.k, pack) + i / pack), i % pack, bits);
      }
      return;
    case StoredLayout::kGptq:
      for (int64_t i = 0; i < m.k; ++i) {
        for (int64_t j = begin; j < end; ++j)
          out[(j - begin) * m.k + i] = CodeOf(Word(m.codes, i / pack * m.n + j), i % pack, bits);
      }
      return;
    case StoredLayout::kAwq:
      for (int64_t j = begin; j < end; ++j) {
        const AwqPlace place = AwqPlaceOf(j);
        for (int64_t i = 0; i < m.k; ++i) {
          out[(j - begin) * m.k + i] =
              CodeOf(Word(m.codes, i * CeilDiv(m.n, 8) + place.word), place.slot, bits);
        }
      }
      return;
  }
}

std::vector<float> UnpackScales(const StoredMatrix& m) {
  const int64_t rows = m.num_scale_rows();
  const int64_t groups = m.num_groups();
  const bool groups_first = GroupsFirst(m.scheme.layout);
  std::vector<float> scales;
  scales.reserve(static_cast<size_t>(rows * groups));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      scales.push_back(FloatElement(m.scales.bytes.data(), m.scales.dtype,
                                    groups_first ? g * rows + r : r * groups + g));
    }
  }
  return scales;
}

std::vector<int32_t> UnpackZeros(const StoredMatrix& m) {
  SY_CHECK(m.is_integer());
  const int64_t rows = m.num_scale_rows();
  const int64_t groups = m.num_groups();
  const int bits = m.scheme.bits;
  const int64_t pack = 32 / bits;
  const int32_t middle = 1 << (bits - 1);
  std::vector<int32_t> zeros(static_cast<size_t>(rows * groups), middle);
  if (m.zeros.empty()) return zeros;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      int32_t zero = 0;
      if (m.zeros.dtype == StoredDType::kI8) {
        zero =
            static_cast<int32_t>(IntElement(m.zeros.bytes.data(), m.zeros.dtype, r * groups + g)) +
            middle;
      } else if (m.scheme.layout == StoredLayout::kPacked) {
        zero = CodeOf(Word(m.zeros, r / pack * groups + g), r % pack, bits);
      } else if (m.scheme.layout == StoredLayout::kGptq) {
        zero = CodeOf(Word(m.zeros, g * CeilDiv(m.n, pack) + r / pack), r % pack, bits) +
               m.scheme.zero_offset;
      } else {
        const AwqPlace place = AwqPlaceOf(r);
        zero = CodeOf(Word(m.zeros, g * CeilDiv(m.n, pack) + place.word), place.slot, bits);
      }
      zeros[static_cast<size_t>(r * groups + g)] = zero;
    }
  }
  return zeros;
}

void Dequantize(const StoredMatrix& matrix, DType dtype, void* out) {
  if (dtype == DType::kF32) {
    DequantizeTo(matrix, static_cast<float*>(out));
  } else {
    DequantizeTo(matrix, static_cast<bf16*>(out));
  }
}

}  // namespace switchyard
