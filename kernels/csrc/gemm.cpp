// Matrix products that PyTorch lacks on the CPU: bfloat16 operands with float32 results or float32 accumulation.
#include "gemm.h"

#include <algorithm>

#include "native.h"
#include "parallel.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

using Array2 = nb::ndarray<nb::ndim<2>, nb::device::cpu>;

bool has_bfloat16_gemm() {
#if defined(ISOMORPH_HAS_AVX512BF16)
    return isa() == "avx512" && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

#if defined(ISOMORPH_HAS_AVX512BF16)
constexpr int64_t kPairBytes = sizeof(uint32_t);  // two bfloat16

uint32_t* pairs(const Scratch& scratch, int64_t piece = 0) { return static_cast<uint32_t*>(scratch.piece(piece)); }

void bfloat16_gemm(Array2 x, Array2 w, Array2 out) {
    const int64_t num_rows = x.shape(0), dim = x.shape(1), num_columns = w.shape(0), num_pairs = dim / 2;
    const int64_t num_blocks = (num_rows + kGemmRows - 1) / kGemmRows;
    const int64_t num_panels = (num_columns + kGemmColumns - 1) / kGemmColumns;
    const auto* x_data = static_cast<const uint16_t*>(x.data());
    const auto* w_data = static_cast<const uint16_t*>(w.data());
    auto* out_data = static_cast<float*>(out.data());
    const int64_t x_stride = x.stride(0), w_stride = w.stride(0), out_stride = out.stride(0);
    nb::gil_scoped_release release;
    const Scratch packed_x(num_blocks * kGemmRows * num_pairs * kPairBytes, 1);
    const Scratch packed_w(num_pairs * kGemmColumns * kPairBytes);
    for_each_task(num_blocks, [&](int64_t block, int64_t) noexcept {
        const int64_t first = block * kGemmRows;
        avx512bf16::pack_rows(x_data + first * x_stride, x_stride, std::min(kGemmRows, num_rows - first), dim,
                              pairs(packed_x) + first * num_pairs);
    });
    for_each_task<8>(num_panels, [&](int64_t i, int64_t worker) noexcept {
        const int64_t first = i * kGemmColumns;
        GemmPanel panel;
        panel.packed_x = pairs(packed_x), panel.w = w_data + first * w_stride, panel.out = out_data + first;
        panel.num_rows = num_rows, panel.num_columns = std::min(kGemmColumns, num_columns - first);
        panel.dim = dim, panel.w_stride = w_stride, panel.out_stride = out_stride;
        panel.packed_w = pairs(packed_w, worker);
        avx512bf16::gemm_panel(panel);
    });
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
    const Scratch packed_b(num_panels * kGemmColumns * num_pairs * kPairBytes, 1);
    const Scratch packed_a(kStripRows * num_pairs * kPairBytes);
    for_each_task(num_panels, [&](int64_t panel, int64_t) noexcept {
        const int64_t first = panel * kGemmColumns;
        avx512bf16::pack_panel(b_data + first, b_stride, num_k, std::min(kGemmColumns, num_columns - first),
                               pairs(packed_b) + first * num_pairs);
    });
    for_each_task<4>(num_strips, [&](int64_t i, int64_t worker) noexcept {
        const int64_t first = i * kStripRows;
        OuterStrip strip;
        strip.a = a_data + first, strip.packed_b = pairs(packed_b);
        strip.out = out_data + first * out_stride;
        strip.num_k = num_k, strip.num_rows = std::min(kStripRows, num_rows - first);
        strip.num_columns = num_columns, strip.a_stride = a_stride, strip.out_stride = out_stride;
        strip.packed_a = pairs(packed_a, worker);
        avx512bf16::outer_strip(strip);
    });
}
#else
[[noreturn]] void refuse() { throw nb::type_error("bfloat16 products need a build for x86-64; see has_bfloat16_gemm()"); }
void bfloat16_gemm(Array2, Array2, Array2) { refuse(); }
void bfloat16_outer(Array2, Array2, Array2) { refuse(); }
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
