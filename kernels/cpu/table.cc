// This path's KernelTable.
#include "kernels/cpu/kernels.h"

namespace switchyard::SY_CPU_PATH {
namespace {

constexpr cpu::KernelTable kTable = {
    .name = SY_CPU_PATH_NAME,
    .max_rows = MaxRows,
    .packed_row_bytes = PackedRowBytes,
    .panels_for_rows = PanelsForRows,
    .pack_rows = PackRows,
    .quantize_weights = QuantizeWeights,
    .matmul = Matmul,
    .matmul_best = MatmulBest,
    .mlp_up = MlpUp,
    .attention = Attention,
    .attention_merge = AttentionMerge,
    .attention_output = AttentionOutput,
    .rms_norm = RmsNorm,
    .rope = Rope,
    .narrow = Narrow,
    .widen = Widen,
    .sigmoid = Sigmoid,
    .accumulate = Accumulate,
    .logit_stats = Stats,
    .exp_sum = ExpSum,
};

}  // namespace

const cpu::KernelTable& Table() { return kTable; }

}  // namespace switchyard::SY_CPU_PATH
