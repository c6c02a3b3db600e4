// Every operand is read once and every result written once, a vector at a time. Only the number of lanes differs between
// instruction sets.
#include "layer.h"

#include "lanes.h"

namespace isomorph {
namespace ISOMORPH_ISA {
namespace {

using Floats = Vec<float>;
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// The upper halves are x in bfloat16: to nearest, ties to even; NaN stays NaN.
ISOMORPH_INLINE Words bfloat16_bits(const Floats& x) {
    Words bits;
    memcpy(&bits, &x, sizeof(bits));
    const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u), quiet = bits | 0x400000u;
    return x != x ? quiet : nearest;
}
ISOMORPH_INLINE void narrow_to(float* to, const Floats& x) { store(to, x); }
ISOMORPH_INLINE void narrow_to(BFloat16* to, const Floats& x) {
    store(to, __builtin_convertvector(bfloat16_bits(x) >> 16, Halves));
}

// Rounds to the storage type and back.
template <typename T>
ISOMORPH_INLINE Floats rounded(const Floats& x) {
    if constexpr (__is_same(T, float)) {
        return x;
    } else {
        const Words bits = bfloat16_bits(x) & 0xffff0000u;
        Floats y;
        memcpy(&y, &bits, sizeof(y));
        return y;
    }
}

// The number of elements of a vector: all lanes, or the last elements of a row.
struct Full {};
struct Part {
    int64_t n;
};

template <typename T>
ISOMORPH_INLINE Floats read(const T* from, Full) {
    return wide<float>(from);
}
// The lanes beyond the elements are 0.
template <typename T>
ISOMORPH_INLINE Floats read(const T* from, Part part) {
    T padded[kLanes] = {};
    memcpy(padded, from, static_cast<size_t>(part.n) * sizeof(T));
    return wide<float>(padded);
}
template <typename T>
ISOMORPH_INLINE void write(T* to, Full, const Floats& x) {
    narrow_to(to, x);
}
template <typename T>
ISOMORPH_INLINE void write(T* to, Part part, const Floats& x) {
    T padded[kLanes];
    narrow_to(padded, x);
    memcpy(to, padded, static_cast<size_t>(part.n) * sizeof(T));
}

// Calls run(i, Full or Part) for the vectors of [0, size).
template <typename Run>
ISOMORPH_INLINE void for_vectors(int64_t size, const Run& run) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) run(i, Full{});
    if (i < size) run(i, Part{size - i});
}
#define ISOMORPH_EACH [&](int64_t i, auto n) __attribute__((always_inline))

template <typename T>
void norm_as(const Norm& norm, const void* x_data, const void* residual_data, float eps, void* y_data, void* total_data,
             float* rstd) {
    const int64_t dim = norm.dim;
    const T* weight = static_cast<const T*>(norm.weight);
    for (int64_t row = 0; row < norm.num_rows; ++row) {
        const T* x = static_cast<const T*>(x_data) + row * dim;
        Floats squares = {};
        if (residual_data) {
            const T* residual = static_cast<const T*>(residual_data) + row * dim;
            T* total = static_cast<T*>(total_data) + row * dim;
            for_vectors(dim, ISOMORPH_EACH {
                const Floats sum = rounded<T>(read(x + i, n) + read(residual + i, n));
                write(total + i, n, sum);
                squares += sum * sum;
            });
            x = total;
        } else {
            for_vectors(dim, ISOMORPH_EACH {
                const Floats v = read(x + i, n);
                squares += v * v;
            });
        }
        const float scale = 1.0f / sqrtf(sum_of<float>(squares) / static_cast<float>(dim) + eps);
        rstd[row] = scale;
        T* y = static_cast<T*>(y_data) + row * dim;
        for_vectors(dim, ISOMORPH_EACH { write(y + i, n, rounded<T>(read(x + i, n) * scale) * read(weight + i, n)); });
    }
}

template <typename T>
void norm_gradient_as(const Norm& norm, const void* total_data, const float* rstd, const void* dy_data,
                      const void* dtotal_data, void* dx_data, float* dweight) {
    const int64_t dim = norm.dim;
    const T* weight = static_cast<const T*>(norm.weight);
    for (int64_t d = 0; d < dim; ++d) dweight[d] = 0;
    for (int64_t row = 0; row < norm.num_rows; ++row) {
        const T* total = static_cast<const T*>(total_data) + row * dim;
        const T* dy = static_cast<const T*>(dy_data) + row * dim;
        const T* dtotal = dtotal_data ? static_cast<const T*>(dtotal_data) + row * dim : nullptr;
        T* dx = static_cast<T*>(dx_data) + row * dim;
        const float scale = rstd[row];
        Floats products = {};
        for_vectors(dim, ISOMORPH_EACH {
            const Floats normal = read(total + i, n) * scale, grad = read(dy + i, n);
            products += grad * read(weight + i, n) * normal;
            write(dweight + i, n, read(dweight + i, n) + grad * rounded<T>(normal));
        });
        const float mean = sum_of<float>(products) / static_cast<float>(dim);
        for_vectors(dim, ISOMORPH_EACH {
            const Floats normal = read(total + i, n) * scale, dnormal = read(dy + i, n) * read(weight + i, n);
            const Floats grad = scale * (dnormal - normal * mean);
            write(dx + i, n, dtotal ? grad + read(dtotal + i, n) : grad);
        });
    }
}

// 1 / (1 + exp(-x)): exactly 0 from x = -87 down.
ISOMORPH_INLINE Floats sigmoid(const Floats& x) {
    Floats e = x < 0.0f ? x : -x;
    exp_in_place(e);
    return (x < 0.0f ? e : Floats{} + 1.0f) / (1.0f + e);
}

template <typename T>
void swiglu_as(const void* gate_data, const void* up_data, int64_t size, void* y_data) {
    const T *gate = static_cast<const T*>(gate_data), *up = static_cast<const T*>(up_data);
    T* y = static_cast<T*>(y_data);
    for_vectors(size, ISOMORPH_EACH {
        const Floats x = read(gate + i, n);
        write(y + i, n, rounded<T>(x * sigmoid(x)) * read(up + i, n));
    });
}

template <typename T>
void swiglu_gradient_as(const void* gate_data, const void* up_data, const void* dy_data, int64_t size, void* dgate_data,
                        void* dup_data) {
    const T *gate = static_cast<const T*>(gate_data), *up = static_cast<const T*>(up_data);
    const T* dy = static_cast<const T*>(dy_data);
    T *dgate = static_cast<T*>(dgate_data), *dup = static_cast<T*>(dup_data);
    for_vectors(size, ISOMORPH_EACH {
        const Floats x = read(gate + i, n), grad = read(dy + i, n), part = sigmoid(x);
        write(dgate + i, n, grad * read(up + i, n) * (part * (1.0f + x * (1.0f - part))));
        write(dup + i, n, grad * rounded<T>(x * part));
    });
}

template <typename T, typename C>
void rotate_as(const Rotation& rotation, const void* x_data, int64_t head_stride, int64_t num_heads, void* out_data) {
    const int64_t half = rotation.half;
    const C *cos = static_cast<const C*>(rotation.cos), *sin = static_cast<const C*>(rotation.sin);
    // the sine that the other half of the input is multiplied by: of the row, or transposed of the column
    const C* low_sin = sin + (rotation.transposed ? half : 0);
    const C* high_sin = sin + (rotation.transposed ? 0 : half);
    const float sign = rotation.transposed ? -1.0f : 1.0f;
    for (int64_t head = 0; head < num_heads; ++head) {
        const T* x = static_cast<const T*>(x_data) + head * head_stride;
        T* out = static_cast<T*>(out_data) + head * 2 * half;
        for_vectors(half, ISOMORPH_EACH {
            const Floats first = read(x + i, n), second = read(x + half + i, n);
            write(out + i, n, first * read(cos + i, n) - second * (sign * read(low_sin + i, n)));
            write(out + half + i, n, second * read(cos + half + i, n) + first * (sign * read(high_sin + i, n)));
        });
    }
}

}  // namespace

#define ISOMORPH_AS(function, ...) \
    (type == Storage::kFloat32 ? function##_as<float>(__VA_ARGS__) : function##_as<BFloat16>(__VA_ARGS__))

void LayerBody::norm(const Norm& norm, const void* x, const void* residual, float eps, void* y, void* total,
                     float* rstd) {
    const Storage type = norm.type;
    ISOMORPH_AS(norm, norm, x, residual, eps, y, total, rstd);
}
void LayerBody::norm_gradient(const Norm& norm, const void* total, const float* rstd, const void* dy,
                              const void* dtotal, void* dx, float* dweight) {
    const Storage type = norm.type;
    ISOMORPH_AS(norm_gradient, norm, total, rstd, dy, dtotal, dx, dweight);
}
void LayerBody::swiglu(Storage type, const void* gate, const void* up, int64_t size, void* y) {
    ISOMORPH_AS(swiglu, gate, up, size, y);
}
void LayerBody::swiglu_gradient(Storage type, const void* gate, const void* up, const void* dy, int64_t size,
                                void* dgate, void* dup) {
    ISOMORPH_AS(swiglu_gradient, gate, up, dy, size, dgate, dup);
}
void LayerBody::rotate(const Rotation& rotation, const void* x, int64_t head_stride, int64_t num_heads, void* out) {
    if (rotation.type == Storage::kFloat32) rotate_as<float, float>(rotation, x, head_stride, num_heads, out);
    else if (rotation.angle_type == Storage::kFloat32) rotate_as<BFloat16, float>(rotation, x, head_stride, num_heads, out);
    else rotate_as<BFloat16, BFloat16>(rotation, x, head_stride, num_heads, out);
}
#undef ISOMORPH_AS

}  // namespace ISOMORPH_ISA
}  // namespace isomorph
