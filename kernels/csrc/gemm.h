// Products of bfloat16 operands, summed in float32 in the order of k whatever else is in the batch. The specification is
// float64 arithmetic on the same bfloat16 numbers.
//     product   out = x w^T     x is packed whole; a task packs one panel of columns of out, that is of rows of w
//     outer     out += a^T b  b is packed whole; a task packs one strip of rows of out, that is of columns of a
#pragma once

#include <stdint.h>

namespace isomorph {

constexpr int64_t kGemmRows = 12, kGemmColumns = 32;  // 12 x 2 sums, 2 registers of w, 1 of x: 27 of 32
constexpr int64_t kStripRows = 8 * kGemmRows;         // whole cache lines of a; with 4096 of k it fits the second level

struct GemmPanel {
    const uint32_t* packed_x;  // blocks of kGemmRows rows, each [dim / 2, kGemmRows] pairs of bfloat16
    const uint16_t* w;         // [num_columns, dim] bfloat16, rows w_stride apart
    float* out;                // [num_rows, num_columns], rows out_stride apart
    int64_t num_rows, num_columns, dim;  // num_columns <= kGemmColumns, dim even
    int64_t w_stride, out_stride;
    uint32_t* packed_w;  // scratch [dim / 2, kGemmColumns]
};

struct OuterStrip {
    const uint16_t* a;         // [num_k, num_rows] bfloat16, rows a_stride apart
    const uint32_t* packed_b;  // panels of kGemmColumns columns, each [pairs of k, kGemmColumns]
    float* out;                // [num_rows, num_columns], rows out_stride apart; added to
    int64_t num_k, num_rows, num_columns;  // num_rows <= kStripRows
    int64_t a_stride, out_stride;
    uint32_t* packed_a;  // scratch: kStripRows / kGemmRows blocks of [pairs of k, kGemmRows]
};

namespace avx512bf16 {
// At most kGemmRows rows into one block of packed_x; rows that are not there keep what was there.
void pack_rows(const uint16_t* x, int64_t stride, int64_t num_rows, int64_t dim, uint32_t* packed);
void gemm_panel(const GemmPanel& panel);
// At most kGemmColumns columns of b [num_k, num_columns] into one panel of packed_b; what is not there is zero.
void pack_panel(const uint16_t* b, int64_t stride, int64_t num_k, int64_t num_columns, uint32_t* packed);
void outer_strip(const OuterStrip& strip);
}  // namespace avx512bf16

}  // namespace isomorph
