// Vectors, conversions and exp for the *_body.cpp files, which are compiled once per instruction set. CMake defines
// ISOMORPH_LANES and ISOMORPH_ISA. These files do not use the C++ standard library: the linker would merge its inline
// functions across instruction sets.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "storage.h"

namespace isomorph {
namespace ISOMORPH_ISA {
namespace {

#define ISOMORPH_INLINE static inline __attribute__((always_inline))

constexpr int64_t kLanes = ISOMORPH_LANES;

template <typename A>
struct Lanes {
    typedef A type __attribute__((vector_size(kLanes * sizeof(A))));
};
template <typename A>
using Vec = typename Lanes<A>::type;

template <typename V, typename P>
ISOMORPH_INLINE V load(const P* p) {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
}
template <typename V, typename P>
ISOMORPH_INLINE void store(P* p, const V& v) {
    memcpy(p, &v, sizeof(v));
}

template <typename A>
ISOMORPH_INLINE A sum_of(const Vec<A>& x) {
    A part[kLanes];
    store(part, x);
    for (int64_t n = kLanes / 2; n > 0; n /= 2) {
        for (int64_t i = 0; i < n; ++i) part[i] += part[i + n];
    }
    return part[0];
}

// -- conversion between storage and arithmetic types
#if defined(__aarch64__)
typedef __fp16 Float16;  // before GCC 13 C++ has _Float16 on x86 alone
#else
typedef _Float16 Float16;
#endif
struct BFloat16 {
    uint16_t bits;
};
ISOMORPH_INLINE float widen(float x) { return x; }
ISOMORPH_INLINE double widen(double x) { return x; }
ISOMORPH_INLINE float widen(Float16 x) { return static_cast<float>(x); }
ISOMORPH_INLINE float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof(wide));
    return wide;
}
ISOMORPH_INLINE void narrow(float* to, float x) { *to = x; }
ISOMORPH_INLINE void narrow(double* to, double x) { *to = x; }
ISOMORPH_INLINE void narrow(Float16* to, float x) { *to = static_cast<Float16>(x); }
ISOMORPH_INLINE void narrow(BFloat16* to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    to->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

// Loads kLanes elements as a vector of A.
template <typename A, typename T>
ISOMORPH_INLINE Vec<A> wide(const T* p) {
    if constexpr (__is_same(T, BFloat16)) {
        typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
        typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
        const Words bits = __builtin_convertvector(load<Halves>(p), Words) << 16;
        return load<Vec<A>>(&bits);
    } else {
        return load<Vec<A>>(p);
    }
}

// to[width] = factor * from[dim], padded with zeros.
template <typename T, typename A>
ISOMORPH_INLINE void widen_row(const T* from, int64_t dim, int64_t width, A factor, A* to) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, wide<A>(from + d) * factor);
    for (; d < dim; ++d) to[d] = widen(from[d]) * factor;
    for (; d < width; ++d) to[d] = 0;
}

// Pointer to row ``row`` of head ``head``.
template <typename T>
ISOMORPH_INLINE T* row_of(const Heads& heads, int64_t row, int64_t head) {
    return static_cast<T*>(heads.data) + row * heads.row_stride + head * heads.head_stride;
}

// exp(x) for x < 88, in place. NaN stays NaN; -inf gives exactly 0.
ISOMORPH_INLINE void exp_in_place(Vec<float>& x) {
    typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
    const Vec<float> clamped = x < -87.0f ? Vec<float>{} - 87.0f : x;
    const Vec<float> shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    const Vec<float> n = shifted - 12582912.0f;
    const Vec<float> r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec<float> y = Vec<float>{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    Ints bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - 0x4b400000 + 127) << 23;
    Vec<float> power;
    memcpy(&power, &bits, sizeof(power));
    x = x < -87.0f ? Vec<float>{} : y * power;
}
ISOMORPH_INLINE void exp_in_place(Vec<double>& x) {
    for (int64_t i = 0; i < kLanes; ++i) x[i] = exp(x[i]);
}

}  // namespace
}  // namespace ISOMORPH_ISA
}  // namespace isomorph
