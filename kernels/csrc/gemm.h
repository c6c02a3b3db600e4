// Matrix products of bfloat16 operands, accumulated in float32 in the order of k for any batch. The specification is
// float64 arithmetic on the same bfloat16 numbers.
//     product   out = x w^T     x is prepacked; a task packs a panel of rows of w and computes those columns of out
//     outer     out += a^T b    b is prepacked; a task packs a strip of columns of a and computes those rows of out
#pragma once

#include <stdint.h>

namespace isomorph {

constexpr int64_t kGemmRows = 12, kGemmColumns = 32;  // 12 x 2 sums, 2 registers of w, 1 of x: 27 of 32 registers
constexpr int64_t kStripRows = 8 * kGemmRows;         // whole cache lines of a; fits the L2 cache up to k = 4096

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
// Packs at most kGemmRows rows into one block of packed_x; missing rows are not written.
void pack_rows(const uint16_t* x, int64_t stride, int64_t num_rows, int64_t dim, uint32_t* packed);
void gemm_panel(const GemmPanel& panel);
// Packs at most kGemmColumns columns of b [num_k, num_columns] into one panel of packed_b; missing columns are zero.
void pack_panel(const uint16_t* b, int64_t stride, int64_t num_k, int64_t num_columns, uint32_t* packed);
void outer_strip(const OuterStrip& strip);
}  // namespace avx512bf16

}  // namespace isomorph
