// One panel of columns of out = x w^T, bfloat16 in, float32 out, summed in float32 in the order of k whatever else is in
// the batch. The specification is float64 arithmetic on the same bfloat16 numbers.
#pragma once

#include <stdint.h>

namespace isomorph {

constexpr int64_t kGemmRows = 12, kGemmColumns = 32;  // 12 x 2 sums, 2 registers of w, 1 of x: 27 of 32

struct GemmPanel {
    const uint32_t* packed_x;  // blocks of kGemmRows rows, each [dim / 2, kGemmRows] pairs of bfloat16
    const uint16_t* w;         // [num_columns, dim] bfloat16, rows w_stride apart
    float* out;                // [num_rows, num_columns], rows out_stride apart
    int64_t num_rows, num_columns, dim;  // num_columns <= kGemmColumns, dim even
    int64_t w_stride, out_stride;
    uint32_t* packed_w;  // scratch [dim / 2, kGemmColumns]
};

namespace avx512bf16 {
// At most kGemmRows rows into one block of packed_x; rows that are not there keep what was there.
void pack_rows(const uint16_t* x, int64_t stride, int64_t num_rows, int64_t dim, uint32_t* packed);
void gemm_panel(const GemmPanel& panel);
}  // namespace avx512bf16

}  // namespace isomorph
