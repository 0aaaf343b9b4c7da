// StoredMatrix: one matrix [n, k] of a checkpoint that is stored in codes, scales and zero points:
//   w[j, i] = scale * (code - zero)       integers
//   w[j, i] = scale * value(code)         float8, mxfp4
// with one scale per block of outputs and inputs. Finding checks every shape, type and index, so
// that reading needs no more checks. Immutable; any thread. The files must outlive it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/tensor.h"
#include "worker/stored_scheme.h"
#include "worker/tensor_table.h"

namespace switchyard {

struct StoredMatrix {
  StoredScheme scheme;
  int64_t n = 0;  // outputs
  int64_t k = 0;  // inputs
  StoredPart codes = {};
  StoredPart scales = {};
  StoredPart zeros = {};        // empty: the middle of the codes
  StoredPart input_group = {};  // I32 [k]: the group of each input; empty: i / block_cols

  int64_t num_groups() const;      // along the inputs
  int64_t num_scale_rows() const;  // along the outputs
  int64_t stored_bytes() const;
  bool is_integer() const;  // codes are integers of scheme.bits bits
};

using FindPart = std::function<StoredPart(const std::string&)>;

// The matrix of `module` ("model.layers.0.self_attn.q_proj"), in the first scheme whose codes are
// there. Nothing when no codes are there; kInvalidArgument with the tensor and the numbers when
// they fit no scheme.
absl::StatusOr<std::optional<StoredMatrix>> FindStoredMatrix(const std::string& module, int64_t n,
                                                             int64_t k,
                                                             const StoredQuantization& quantization,
                                                             const FindPart& find);

// Rows [row, row + n) of expert `expert` in fused mxfp4 tensors NAME_blocks [experts, rows, k/32,
// 16] and NAME_scales [experts, rows, k/32], as gpt-oss has them.
struct FusedRows {
  std::string name = {};
  int64_t experts = 0;
  int64_t rows = 0;
  int64_t expert = 0;
  int64_t row = 0;
};
absl::StatusOr<std::optional<StoredMatrix>> FindFusedMxfp4(const FusedRows& place, int64_t n,
                                                           int64_t k, const FindPart& find);

// The weights, [n, k] row-major: the product in float32, rounded once to `dtype` (float32 or
// bfloat16). `out` has room for them.
void Dequantize(const StoredMatrix& matrix, DType dtype, void* out);

// The parts for whoever computes with the codes themselves. Codes of output rows [begin, end), one
// a byte, [end - begin, k]: integers as unsigned numbers whose middle is 2^(bits - 1), float8 and
// fp4 as they are.
void UnpackCodes(const StoredMatrix& matrix, int64_t begin, int64_t end, uint8_t* out);
std::vector<float> UnpackScales(const StoredMatrix& matrix);   // [num_scale_rows, num_groups]
std::vector<int32_t> UnpackZeros(const StoredMatrix& matrix);  // the same, as unsigned as the codes

}  // namespace switchyard
