// A block is widened into a buffer in the first-level cache, worked on there, and narrowed again. The number of lanes is
// the one thing that differs between instruction sets. Nothing here may come from the C++ library.
#include "rows.h"

#include <math.h>
#include <string.h>

namespace isomorph {
namespace ISOMORPH_ISA {
namespace {

#define ISOMORPH_INLINE static inline __attribute__((always_inline))

constexpr int64_t kLanes = ISOMORPH_LANES;
constexpr int64_t kSums = 4;  // independent sums, so that none waits for itself
static_assert(kRowBlock % (kLanes * kSums) == 0);

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

void widen(const uint16_t* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
        memcpy(to + i, &bits, sizeof(bits));
    }
}
void narrow(const float* from, int64_t n, uint16_t* to) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof(bits));
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
        to[i] = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
    }
}

template <typename A>
void read(const void* row, RowType type, int64_t first, int64_t n, A* to) {
    if constexpr (sizeof(A) == sizeof(double)) {
        memcpy(to, static_cast<const double*>(row) + first, n * sizeof(A));
    } else if (type == RowType::kFloat32) {
        memcpy(to, static_cast<const float*>(row) + first, n * sizeof(A));
    } else if (type == RowType::kBFloat16) {
        widen(static_cast<const uint16_t*>(row) + first, n, to);
    } else {
        const _Float16* half = static_cast<const _Float16*>(row) + first;
        for (int64_t i = 0; i < n; ++i) to[i] = half[i];
    }
}

template <typename A>
void write(const A* from, int64_t n, void* row, RowType type, int64_t first) {
    if constexpr (sizeof(A) == sizeof(double)) {
        memcpy(static_cast<double*>(row) + first, from, n * sizeof(A));
    } else if (type == RowType::kFloat32) {
        memcpy(static_cast<float*>(row) + first, from, n * sizeof(A));
    } else if (type == RowType::kBFloat16) {
        narrow(from, n, static_cast<uint16_t*>(row) + first);
    } else {
        _Float16* half = static_cast<_Float16*>(row) + first;
        for (int64_t i = 0; i < n; ++i) half[i] = static_cast<_Float16>(from[i]);
    }
}

// z of n columns, then -inf, a probability of 0, up to whole vectors. Returns how many there are.
template <typename A>
int64_t read_z(const void* row, RowType type, int64_t first, int64_t n, const RowScale<A>& scale, A* z) {
    constexpr int64_t kStep = kLanes * kSums;
    const int64_t padded = (n + kStep - 1) / kStep * kStep;
    read(row, type, first, n, z);
    if (scale.bias) {
        for (int64_t i = 0; i < n; ++i) z[i] += scale.bias[first + i];
    }
    for (int64_t i = 0; i < n; ++i) z[i] *= scale.inv_temperature;
    for (int64_t i = n; i < padded; ++i) z[i] = -static_cast<A>(INFINITY);
    return padded;
}

// exp of x < 88. NaN stays NaN; -inf gives exactly 0.
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

// Where a probability is 0 its logarithm must not make NaN of their product.
template <typename A>
ISOMORPH_INLINE Vec<A> finite_log(const Vec<A>& logp) {
    return logp < A(-1e30) ? Vec<A>{} + A(-1e30) : logp;
}

template <typename A>
A largest(const A* z, int64_t n) {
    Vec<A> top[kSums];
    for (int64_t k = 0; k < kSums; ++k) top[k] = Vec<A>{} - static_cast<A>(INFINITY);
    for (int64_t i = 0; i < n; i += kLanes * kSums) {
        for (int64_t k = 0; k < kSums; ++k) {
            const Vec<A> v = load<Vec<A>>(z + i + k * kLanes);
            top[k] = v > top[k] ? v : top[k];
        }
    }
    A best = top[0][0];
    for (int64_t k = 0; k < kSums; ++k) {
        for (int64_t i = 0; i < kLanes; ++i) best = top[k][i] > best ? top[k][i] : best;
    }
    return best;
}

template <typename A>
double total(const Vec<A> (&sums)[kSums]) {
    double sum = 0;
    for (int64_t k = 0; k < kSums; ++k) {
        for (int64_t i = 0; i < kLanes; ++i) sum += static_cast<double>(sums[k][i]);
    }
    return sum;
}

}  // namespace

template <typename A>
A RowsBody<A>::z_at(const void* row, RowType type, int64_t column, const RowScale<A>& scale) {
    alignas(64) A z[kLanes * kSums];
    read_z(row, type, column, 1, scale, z);
    return z[0];
}

template <typename A>
BlockStats RowsBody<A>::stats(const void* row, RowType type, int64_t first, int64_t num_columns,
                              const RowScale<A>& scale) {
    alignas(64) A z[kRowBlock];
    const int64_t n = read_z(row, type, first, num_columns, scale, z);
    const A top = largest(z, n);
    const A shift = top == -static_cast<A>(INFINITY) ? A(0) : top;
    Vec<A> sum[kSums] = {}, weighted[kSums] = {};
    for (int64_t i = 0; i < n; i += kLanes * kSums) {
        for (int64_t k = 0; k < kSums; ++k) {
            const Vec<A> d = load<Vec<A>>(z + i + k * kLanes) - shift;
            Vec<A> p = d;
            exp_in_place(p);
            sum[k] += p;
            weighted[k] += p * finite_log<A>(d);
        }
    }
    return {top, total<A>(sum), total<A>(weighted)};
}

template <typename A>
void RowsBody<A>::gradient(const void* row, RowType type, int64_t first, int64_t num_columns, const RowScale<A>& scale,
                           const RowGradient<A>& grad, void* out, RowType out_type) {
    alignas(64) A z[kRowBlock];
    const int64_t n = read_z(row, type, first, num_columns, scale, z);
    const A factor = grad.dlse - grad.dlogprob;
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec<A> logp = load<Vec<A>>(z + i) - grad.z_target + grad.logprob;
        Vec<A> p = logp;
        exp_in_place(p);
        store(z + i, p * (factor - grad.dentropy * (finite_log<A>(logp) + grad.entropy)));
    }
    if (grad.target >= first && grad.target < first + num_columns) z[grad.target - first] += grad.dlogprob;
    for (int64_t i = 0; i < n; ++i) z[i] *= scale.inv_temperature;
    write(z, num_columns, out, out_type, first);
}

template struct RowsBody<float>;
template struct RowsBody<double>;

}  // namespace ISOMORPH_ISA
}  // namespace isomorph
