// The functions of one instruction path, as table.cc collects them; see kernel_table.h for what
// each does.
#pragma once

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/simd.h"

namespace switchyard::SY_CPU_PATH {

// row_packing.cc
size_t PackedRowBytes(int64_t k, WeightFormat format);
void PackRows(const cpu::PackRowsItem& item);

// quantize_kernel.cc
void QuantizeWeights(const float* w, int64_t count, WeightType type, uint16_t* halves,
                     uint8_t* codes);

// matmul_kernel.cc
int MaxRows(WeightFormat format);
int PanelsForRows(int64_t rows, int block_rows);
void Matmul(const cpu::MatmulItem& item);
void MatmulBest(const cpu::MatmulItem& item);
void MlpUp(const cpu::MatmulItem& item);

// attention_kernel.cc
void Attention(const cpu::AttentionItem& item);
void AttentionMerge(const cpu::AttentionItem& item, int64_t split, const float* from);
void AttentionOutput(const cpu::AttentionItem& item, void* out, bool out_bf16);

// row_kernels.cc
void RmsNorm(const float* x, const float* weight, float eps, int64_t n, void* out, bool out_bf16);
void Rope(float* x, const float* cos, const float* sin, const cpu::RopeShape& shape);
void Narrow(const float* x, int64_t n, uint16_t* out);
void Widen(const uint16_t* x, int64_t n, float* out);
void Sigmoid(float* x, int64_t n);
void Accumulate(const void* x, bool bf16, float weight, int64_t n, float* sum);
cpu::LogitStats Stats(const float* x, int64_t n);
double ExpSum(const float* x, int64_t n, float max, float scale, float* out);

}  // namespace switchyard::SY_CPU_PATH
