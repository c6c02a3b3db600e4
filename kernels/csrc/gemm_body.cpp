// Both products of gemm.h are computed in tiles of 12 x 32 over packed operands: pairs of elements adjacent in k.
// Compiled for AVX-512 with bfloat16 dot products; like lanes.h without the C++ standard library.
#include "gemm.h"

#include <immintrin.h>
#include <string.h>

namespace isomorph {
namespace avx512bf16 {
namespace {

constexpr int64_t kLanes = 16;
static_assert(kGemmColumns == 2 * kLanes);

__mmask16 lanes(int64_t live) {
    return live >= kLanes ? 0xffff : live > 0 ? static_cast<__mmask16>((1u << live) - 1) : 0;
}

// Transposes 16 x 16 pairs in place.
inline __attribute__((always_inline)) void transpose(__m512i (&r)[kLanes]) {
    __m512i t[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Packs rows of w, as pairs adjacent in k, to packed[k / 2][column] with 32 columns; missing columns are zero.
void pack_columns(const uint16_t* w, int64_t stride, int64_t num_columns, int64_t dim, uint32_t* packed) {
    for (int64_t k = 0; k < dim; k += 2 * kLanes) {
        const int64_t pairs = (dim - k) / 2 < kLanes ? (dim - k) / 2 : kLanes;
        for (int64_t half = 0; half < 2; ++half) {
            __m512i block[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const int64_t column = half * kLanes + i;
                block[i] = column < num_columns ? _mm512_maskz_loadu_epi32(lanes(pairs), w + column * stride + k)
                                                : _mm512_setzero_si512();
            }
            transpose(block);
            for (int64_t i = 0; i < pairs; ++i) {
                _mm512_storeu_si512(packed + (k / 2 + i) * kGemmColumns + half * kLanes, block[i]);
            }
        }
    }
}

// Packs at most kWidth columns of a [num_k, num_columns], as pairs adjacent in k, to packed[k / 2][kWidth].
template <int64_t kWidth>
void pack_pairs(const uint16_t* a, int64_t stride, int64_t num_k, int64_t num_columns, uint32_t* packed) {
    for (int64_t k = 0; k < num_k; k += 2, packed += kWidth) {
        const uint16_t *low = a + k * stride, *high = low + stride;
        for (int64_t c = 0; c < kWidth; c += kLanes) {
            const __mmask16 live = lanes(num_columns - c);
            __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, low + c));
            if (k + 1 < num_k) {
                const __m512i next = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, high + c));
                pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(next, 16));
            }
            _mm512_mask_storeu_epi32(packed + c, lanes(kWidth - c), pairs);
        }
    }
}

// Multiplies the first R of the 12 rows of a block. x[k / 2][row] and w[k / 2][column] have constant offsets.
template <int64_t R, bool kAdds>
void multiply(const uint32_t* x, const uint32_t* w, int64_t num_pairs, float* out, int64_t out_stride, __mmask16 first,
              __mmask16 second) {
    __m512 sum[R][2];
    for (int64_t r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < num_pairs; ++k, x += kGemmRows, w += kGemmColumns) {
        const __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
        const __m512bh w1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + kLanes));
#pragma GCC unroll 12
        for (int64_t r = 0; r < R; ++r) {
            const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(x[r])));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], pair, w0);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], pair, w1);
        }
    }
    for (int64_t r = 0; r < R; ++r, out += out_stride) {
        if constexpr (kAdds) {
            sum[r][0] = _mm512_add_ps(_mm512_maskz_loadu_ps(first, out), sum[r][0]);
            sum[r][1] = _mm512_add_ps(_mm512_maskz_loadu_ps(second, out + kLanes), sum[r][1]);
        }
        _mm512_mask_storeu_ps(out, first, sum[r][0]);
        _mm512_mask_storeu_ps(out + kLanes, second, sum[r][1]);
    }
}

using MultiplyFn = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, __mmask16, __mmask16);

// Indexed by R, the number of rows.
template <bool kAdds>
constexpr MultiplyFn kMultiply[kGemmRows + 1] = {
    nullptr,
    multiply<1, kAdds>, multiply<2, kAdds>, multiply<3, kAdds>, multiply<4, kAdds>,
    multiply<5, kAdds>, multiply<6, kAdds>, multiply<7, kAdds>, multiply<8, kAdds>,
    multiply<9, kAdds>, multiply<10, kAdds>, multiply<11, kAdds>, multiply<12, kAdds>,
};

}  // namespace

void pack_rows(const uint16_t* x, int64_t stride, int64_t num_rows, int64_t dim, uint32_t* packed) {
    for (int64_t r = 0; r < num_rows; ++r) {
        for (int64_t k = 0; k < dim; k += 2) memcpy(packed + k / 2 * kGemmRows + r, x + r * stride + k, sizeof(*packed));
    }
}

void gemm_panel(const GemmPanel& panel) {
    const int64_t num_pairs = panel.dim / 2;
    pack_columns(panel.w, panel.w_stride, panel.num_columns, panel.dim, panel.packed_w);
    const __mmask16 first = lanes(panel.num_columns), second = lanes(panel.num_columns - kLanes);
    for (int64_t row = 0; row < panel.num_rows; row += kGemmRows) {
        const int64_t live = panel.num_rows - row < kGemmRows ? panel.num_rows - row : kGemmRows;
        kMultiply<false>[live](panel.packed_x + row * num_pairs, panel.packed_w, num_pairs,
                               panel.out + row * panel.out_stride, panel.out_stride, first, second);
    }
}

void pack_panel(const uint16_t* b, int64_t stride, int64_t num_k, int64_t num_columns, uint32_t* packed) {
    pack_pairs<kGemmColumns>(b, stride, num_k, num_columns, packed);
}

void outer_strip(const OuterStrip& strip) {
    const int64_t num_pairs = (strip.num_k + 1) / 2;
    for (int64_t row = 0; row < strip.num_rows; row += kGemmRows) {
        const int64_t live = strip.num_rows - row < kGemmRows ? strip.num_rows - row : kGemmRows;
        pack_pairs<kGemmRows>(strip.a + row, strip.a_stride, strip.num_k, live, strip.packed_a + row * num_pairs);
    }
    for (int64_t column = 0; column < strip.num_columns; column += kGemmColumns) {
        const __mmask16 first = lanes(strip.num_columns - column), second = lanes(strip.num_columns - column - kLanes);
        for (int64_t row = 0; row < strip.num_rows; row += kGemmRows) {
            const int64_t live = strip.num_rows - row < kGemmRows ? strip.num_rows - row : kGemmRows;
            kMultiply<true>[live](strip.packed_a + row * num_pairs, strip.packed_b + column * num_pairs, num_pairs,
                                  strip.out + row * strip.out_stride + column, strip.out_stride, first, second);
        }
    }
}

}  // namespace avx512bf16
}  // namespace isomorph
