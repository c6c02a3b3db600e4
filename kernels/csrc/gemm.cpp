// Products that PyTorch does not offer on the CPU: bfloat16 operands, float32 results, or sums kept in float32.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "native.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

using Array2 = nb::ndarray<nb::ndim<2>, nb::device::cpu>;
using Scratch = std::unique_ptr<uint32_t, void (*)(void*)>;

bool has_bfloat16_gemm() {
#if defined(ISOMORPH_HAS_AVX512BF16)
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

#if defined(ISOMORPH_HAS_AVX512BF16)
Scratch make_scratch(int64_t items) {
    const size_t bytes = (static_cast<size_t>(items) * sizeof(uint32_t) + 63) / 64 * 64;
    return {static_cast<uint32_t*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))), &std::free};
}

void bfloat16_gemm(Array2 x, Array2 w, Array2 out) {
    const int64_t num_rows = x.shape(0), dim = x.shape(1), num_columns = w.shape(0), num_pairs = dim / 2;
    const int64_t num_blocks = (num_rows + kGemmRows - 1) / kGemmRows;
    const int64_t num_panels = (num_columns + kGemmColumns - 1) / kGemmColumns;
    const auto* x_data = static_cast<const uint16_t*>(x.data());
    const auto* w_data = static_cast<const uint16_t*>(w.data());
    auto* out_data = static_cast<float*>(out.data());
    const int64_t x_stride = x.stride(0), w_stride = w.stride(0), out_stride = out.stride(0);
    nb::gil_scoped_release release;
    const Scratch packed_x = make_scratch(num_blocks * kGemmRows * num_pairs);
#pragma omp parallel
    {
        const Scratch packed_w = make_scratch(num_pairs * kGemmColumns);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < num_blocks; ++block) {
            const int64_t first = block * kGemmRows;
            avx512bf16::pack_rows(x_data + first * x_stride, x_stride, std::min(kGemmRows, num_rows - first), dim,
                                  packed_x.get() + first * num_pairs);
        }
#pragma omp for schedule(dynamic, 8)
        for (int64_t i = 0; i < num_panels; ++i) {
            const int64_t first = i * kGemmColumns;
            GemmPanel panel;
            panel.packed_x = packed_x.get(), panel.w = w_data + first * w_stride, panel.out = out_data + first;
            panel.num_rows = num_rows, panel.num_columns = std::min(kGemmColumns, num_columns - first);
            panel.dim = dim, panel.w_stride = w_stride, panel.out_stride = out_stride;
            panel.packed_w = packed_w.get();
            avx512bf16::gemm_panel(panel);
        }
    }
}

// out [columns of a, columns of b] += a^T b.
void bfloat16_outer(Array2 a, Array2 b, Array2 out) {
    const int64_t num_k = a.shape(0), num_rows = a.shape(1), num_columns = b.shape(1), num_pairs = (num_k + 1) / 2;
    const int64_t num_strips = (num_rows + kStripRows - 1) / kStripRows;
    const int64_t num_panels = (num_columns + kGemmColumns - 1) / kGemmColumns;
    const auto* a_data = static_cast<const uint16_t*>(a.data());
    const auto* b_data = static_cast<const uint16_t*>(b.data());
    auto* out_data = static_cast<float*>(out.data());
    const int64_t a_stride = a.stride(0), b_stride = b.stride(0), out_stride = out.stride(0);
    nb::gil_scoped_release release;
    const Scratch packed_b = make_scratch(num_panels * kGemmColumns * num_pairs);
#pragma omp parallel
    {
        const Scratch packed_a = make_scratch(kStripRows * num_pairs);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < num_panels; ++panel) {
            const int64_t first = panel * kGemmColumns;
            avx512bf16::pack_panel(b_data + first, b_stride, num_k, std::min(kGemmColumns, num_columns - first),
                                   packed_b.get() + first * num_pairs);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < num_strips; ++i) {
            const int64_t first = i * kStripRows;
            OuterStrip strip;
            strip.a = a_data + first, strip.packed_b = packed_b.get();
            strip.out = out_data + first * out_stride;
            strip.num_k = num_k, strip.num_rows = std::min(kStripRows, num_rows - first);
            strip.num_columns = num_columns, strip.a_stride = a_stride, strip.out_stride = out_stride;
            strip.packed_a = packed_a.get();
            avx512bf16::outer_strip(strip);
        }
    }
}
#else
void bfloat16_gemm(Array2, Array2, Array2) { throw nb::type_error("bfloat16_gemm: built without AVX-512"); }
void bfloat16_outer(Array2, Array2, Array2) { throw nb::type_error("bfloat16_outer: built without AVX-512"); }
#endif

}  // namespace

void bind_gemm(nb::module_& module) {
    module.def("has_bfloat16_gemm", &has_bfloat16_gemm);
    module.def("bfloat16_gemm", &bfloat16_gemm, nb::arg("x").noconvert(), nb::arg("w").noconvert(),
               nb::arg("out").noconvert());
    module.def("bfloat16_outer", &bfloat16_outer, nb::arg("a").noconvert(), nb::arg("b").noconvert(),
               nb::arg("out").noconvert());
}

}  // namespace isomorph
