// RMS norm, SwiGLU and rotary embedding: a task per block of rows, tokens or elements.
#include "layer.h"

#include <algorithm>
#include <cstdint>

#include "native.h"
#include "parallel.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

constexpr int64_t kTask = 16384;   // elements of a task, more or less; fewer are not worth a thread
constexpr int64_t kPartials = 64;  // sums over rows that the gradient of a norm's weight is made of, at most

// Arrays come as addresses: a layer calls these functions often, and reading a few tensors through DLPack takes longer
// than a small op. kernels/layer_native.py checks what nanobind would. 0: there is none.
using Address = uintptr_t;

char* at(Address address) { return reinterpret_cast<char*>(address); }
char* at(char* data, int64_t offset) { return data ? data + offset : nullptr; }
float* floats_at(Address address) { return reinterpret_cast<float*>(address); }

Storage storage(bool is_bfloat16) { return is_bfloat16 ? Storage::kBFloat16 : Storage::kFloat32; }
int64_t item_bytes(Storage type) { return type == Storage::kFloat32 ? 4 : 2; }

int64_t divided_up(int64_t number, int64_t size) { return (number + size - 1) / size; }

void rms_norm(bool is_bfloat16, int64_t num, int64_t dim, Address x, Address residual, Address weight, float eps,
              Address y, Address total, Address rstd) {
    const Storage type = storage(is_bfloat16);
    const int64_t rows = std::max<int64_t>(1, kTask / std::max<int64_t>(dim, 1));
#define ISOMORPH_NORM(isa) isa::LayerBody::norm
    const auto run = ISOMORPH_OF_ISA(ISOMORPH_NORM);
#undef ISOMORPH_NORM
    nb::gil_scoped_release release;
    for_each_task(divided_up(num, rows), [&](int64_t task, int64_t) noexcept {
        const int64_t first = task * rows, offset = first * dim * item_bytes(type);
        const Norm norm = {type, std::min(rows, num - first), dim, at(weight)};
        run(norm, at(x) + offset, at(at(residual), offset), eps, at(y) + offset, at(at(total), offset),
            floats_at(rstd) + first);
    });
}

void rms_norm_gradient(bool is_bfloat16, int64_t num, int64_t dim, Address total, Address weight, Address rstd,
                       Address dy, Address dtotal, Address dx, Address dweight) {
    const Storage type = storage(is_bfloat16);
    const int64_t rows = std::max({int64_t{1}, kTask / std::max<int64_t>(dim, 1), divided_up(num, kPartials)});
    const int64_t num_tasks = divided_up(num, rows);
#define ISOMORPH_NORM_GRADIENT(isa) isa::LayerBody::norm_gradient
    const auto run = ISOMORPH_OF_ISA(ISOMORPH_NORM_GRADIENT);
#undef ISOMORPH_NORM_GRADIENT
    nb::gil_scoped_release release;
    const Scratch partials(dim * static_cast<int64_t>(sizeof(float)), num_tasks);
    for_each_task(num_tasks, [&](int64_t task, int64_t) noexcept {
        const int64_t first = task * rows, offset = first * dim * item_bytes(type);
        const Norm norm = {type, std::min(rows, num - first), dim, at(weight)};
        run(norm, at(total) + offset, floats_at(rstd) + first, at(dy) + offset, at(at(dtotal), offset), at(dx) + offset,
            static_cast<float*>(partials.piece(task)));
    });
    float* summed = floats_at(dweight);
    std::fill(summed, summed + dim, 0.0f);
    for (int64_t task = 0; task < num_tasks; ++task) {  // in order: the bits do not depend on the threads
        const auto* part = static_cast<const float*>(partials.piece(task));
        for (int64_t d = 0; d < dim; ++d) summed[d] += part[d];
    }
}

// Calls run(offset in bytes, number of elements) for pieces of [0, size).
template <typename Run>
void for_elements(Storage type, int64_t size, const Run& run) {
    nb::gil_scoped_release release;
    for_each_task(divided_up(size, kTask), [&](int64_t task, int64_t) noexcept {
        run(task * kTask * item_bytes(type), std::min(kTask, size - task * kTask));
    });
}

void swiglu(bool is_bfloat16, int64_t size, Address gate, Address up, Address y) {
    const Storage type = storage(is_bfloat16);
#define ISOMORPH_SWIGLU(isa) isa::LayerBody::swiglu
    const auto run = ISOMORPH_OF_ISA(ISOMORPH_SWIGLU);
#undef ISOMORPH_SWIGLU
    for_elements(type, size, [&](int64_t offset, int64_t n) noexcept {
        run(type, at(gate) + offset, at(up) + offset, n, at(y) + offset);
    });
}

void swiglu_gradient(bool is_bfloat16, int64_t size, Address gate, Address up, Address dy, Address dgate, Address dup) {
    const Storage type = storage(is_bfloat16);
#define ISOMORPH_SWIGLU_GRADIENT(isa) isa::LayerBody::swiglu_gradient
    const auto run = ISOMORPH_OF_ISA(ISOMORPH_SWIGLU_GRADIENT);
#undef ISOMORPH_SWIGLU_GRADIENT
    for_elements(type, size, [&](int64_t offset, int64_t n) noexcept {
        run(type, at(gate) + offset, at(up) + offset, at(dy) + offset, n, at(dgate) + offset, at(dup) + offset);
    });
}

// Heads [N, num_heads, dim] with a contiguous last dimension, and where they go: contiguous. Strides in elements.
struct Rotated {
    Address from, to;
    int64_t num_heads, row_stride, head_stride;
};

void rotary(bool is_bfloat16, bool is_angle_bfloat16, int64_t num, int64_t dim, Address cos, Address sin, bool transposed, Address q,
            int64_t num_q, int64_t q_row, int64_t q_head, Address q_out, Address k, int64_t num_k, int64_t k_row,
            int64_t k_head, Address k_out) {
    const Storage type = storage(is_bfloat16), angle_type = storage(is_angle_bfloat16);
    const int64_t bytes = item_bytes(type), rows = std::max<int64_t>(1, kTask / std::max<int64_t>((num_q + num_k) * dim, 1));
    const Rotated operands[2] = {{q, q_out, num_q, q_row, q_head}, {k, k_out, num_k, k_row, k_head}};
#define ISOMORPH_ROTATE(isa) isa::LayerBody::rotate
    const auto run = ISOMORPH_OF_ISA(ISOMORPH_ROTATE);
#undef ISOMORPH_ROTATE
    nb::gil_scoped_release release;
    for_each_task(divided_up(num, rows), [&](int64_t task, int64_t) noexcept {
        for (int64_t row = task * rows; row < std::min((task + 1) * rows, num); ++row) {
            const int64_t offset = row * dim * item_bytes(angle_type);
            const Rotation rotation = {type, angle_type, dim / 2, at(cos) + offset, at(sin) + offset, transposed};
            for (const Rotated& x : operands) {
                run(rotation, at(x.from) + row * x.row_stride * bytes, x.head_stride, x.num_heads,
                    at(x.to) + row * x.num_heads * dim * bytes);
            }
        }
    });
}

}  // namespace

void bind_layer(nb::module_& module) {
    module.def("rms_norm", &rms_norm, nb::arg("is_bfloat16"), nb::arg("num"), nb::arg("dim"), nb::arg("x"),
               nb::arg("residual"), nb::arg("weight"), nb::arg("eps"), nb::arg("y"), nb::arg("total"),
               nb::arg("rstd"));
    module.def("rms_norm_gradient", &rms_norm_gradient, nb::arg("is_bfloat16"), nb::arg("num"), nb::arg("dim"),
               nb::arg("total"), nb::arg("weight"), nb::arg("rstd"), nb::arg("dy"), nb::arg("dtotal"),
               nb::arg("dx"), nb::arg("dweight"));
    module.def("swiglu", &swiglu, nb::arg("is_bfloat16"), nb::arg("size"), nb::arg("gate"), nb::arg("up"),
               nb::arg("y"));
    module.def("swiglu_gradient", &swiglu_gradient, nb::arg("is_bfloat16"), nb::arg("size"), nb::arg("gate"),
               nb::arg("up"), nb::arg("dy"), nb::arg("dgate"), nb::arg("dup"));
    module.def("rotary", &rotary, nb::arg("is_bfloat16"), nb::arg("is_angle_bfloat16"), nb::arg("num"),
               nb::arg("dim"), nb::arg("cos"), nb::arg("sin"), nb::arg("transposed"), nb::arg("q"),
               nb::arg("num_q"), nb::arg("q_row"), nb::arg("q_head"), nb::arg("q_out"), nb::arg("k"),
               nb::arg("num_k"), nb::arg("k_row"), nb::arg("k_head"), nb::arg("k_out"));
}

}  // namespace isomorph
