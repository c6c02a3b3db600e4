// Scores stand as [key, query], so that eight queries of a group go through one vector register and a prompt's key is
// read once for all of them. A row's own keys concern its few query heads alone: there the vector runs along dim.
#include "decode.h"

#include <math.h>
#include <string.h>

namespace isomorph {
namespace ISOMORPH_ISA {
namespace {

constexpr int64_t kLanes = 8;

template <typename A>
struct Lanes {
    typedef A type __attribute__((vector_size(kLanes * sizeof(A))));
};
template <typename A>
using Vec = typename Lanes<A>::type;

#define ISOMORPH_INLINE static inline __attribute__((always_inline))

template <typename A>
ISOMORPH_INLINE void load(Vec<A>& v, const A* p) {
    memcpy(&v, p, sizeof(v));
}
template <typename A>
ISOMORPH_INLINE void store(A* p, const Vec<A>& v) {
    memcpy(p, &v, sizeof(v));
}

struct BFloat16 {
    uint16_t bits;
};
ISOMORPH_INLINE float widen(float x) { return x; }
ISOMORPH_INLINE double widen(double x) { return x; }
ISOMORPH_INLINE float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof(wide));
    return wide;
}
ISOMORPH_INLINE void narrow(float* to, float x) { *to = x; }
ISOMORPH_INLINE void narrow(double* to, double x) { *to = x; }
ISOMORPH_INLINE void narrow(BFloat16* to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    to->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

// exp of x <= 0. NaN stays NaN; -inf gives exactly 0.
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

template <typename A>
struct Matrix {
    const A* data;
    int64_t stride;
};

// Entries as A, [len, width] with zeros beyond dim: where they lie, or copied.
template <typename T, typename A>
Matrix<A> entries(const Rows& rows, int64_t dim, int64_t width, A*& scratch) {
    if constexpr (__is_same(T, A)) {
        if (dim == width) return {static_cast<const A*>(rows.data), rows.stride};
    }
    A* copy = scratch;
    scratch += rows.len * width;
    for (int64_t i = 0; i < rows.len; ++i) {
        const T* from = static_cast<const T*>(rows.data) + i * rows.stride;
        for (int64_t d = 0; d < dim; ++d) copy[i * width + d] = widen(from[d]);
        for (int64_t d = dim; d < width; ++d) copy[i * width + d] = A(0);
    }
    return {copy, width};
}

// scores[key, query] = keys . queries, for NK keys and eight queries.
template <int NK, typename A>
ISOMORPH_INLINE void score_block(const Matrix<A>& keys, int64_t first, const A* q_dim_query, int64_t queries, int64_t dim,
                                 A* scores) {
    Vec<A> sum[NK] = {};
    for (int64_t d = 0; d < dim; ++d) {
        Vec<A> q;
        load<A>(q, q_dim_query + d * queries);
        for (int i = 0; i < NK; ++i) sum[i] += keys.data[(first + i) * keys.stride + d] * q;
    }
    for (int i = 0; i < NK; ++i) store<A>(scores + (first + i) * queries, sum[i]);
}

template <typename A>
void score_prompt(const Matrix<A>& keys, int64_t len, const A* q_dim_query, int64_t queries, int64_t dim, A* scores) {
    for (int64_t r = 0; r < queries; r += kLanes) {
        int64_t key = 0;
        for (; key + 8 <= len; key += 8) score_block<8>(keys, key, q_dim_query + r, queries, dim, scores + r);
        for (; key < len; ++key) score_block<1>(keys, key, q_dim_query + r, queries, dim, scores + r);
    }
}

template <typename A>
ISOMORPH_INLINE A sum_of(const Vec<A>& x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// scores[key, one query] = keys . query, for NK keys: as many sums at a time, since one would wait for itself.
template <int NK, typename A>
ISOMORPH_INLINE void dot_block(const Matrix<A>& keys, int64_t first, const A* query, int64_t queries, int64_t width,
                               A* scores) {
    Vec<A> sum[NK] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
        Vec<A> q, k;
        load<A>(q, query + d);
        for (int i = 0; i < NK; ++i) {
            load<A>(k, keys.data + (first + i) * keys.stride + d);
            sum[i] += k * q;
        }
    }
    for (int i = 0; i < NK; ++i) scores[(first + i) * queries] = sum_of<A>(sum[i]);
}

template <typename A>
void score_own(const Matrix<A>& keys, int64_t len, const A* query, int64_t queries, int64_t width, A* scores) {
    int64_t key = 0;
    for (; key + 4 <= len; key += 4) dot_block<4>(keys, key, query, queries, width, scores);
    for (; key < len; ++key) dot_block<1>(keys, key, query, queries, width, scores);
}

// Scores to weights, not yet divided by their sum.
template <typename A>
void weigh(A* scores, int64_t len, int64_t queries, A* sums) {
    for (int64_t r = 0; r < queries; r += kLanes) {
        Vec<A> top, x, sum = {};
        load<A>(top, scores + r);
        for (int64_t key = 1; key < len; ++key) {
            load<A>(x, scores + key * queries + r);
            top = x > top ? x : top;
        }
        for (int64_t key = 0; key < len; ++key) {
            load<A>(x, scores + key * queries + r);
            x -= top;
            exp_in_place(x);
            sum += x;
            store<A>(scores + key * queries + r, x);
        }
        store<A>(sums + r, sum);
    }
}

// out[query, dim] = weights of eight queries . values, eight columns of dim at a time.
template <typename A>
void sum_prompt(const Matrix<A>& values, int64_t len, const A* weights, int64_t queries, int64_t width, A* out) {
    for (int64_t r = 0; r < queries; r += kLanes) {
        for (int64_t d = 0; d < width; d += kLanes) {
            Vec<A> sum[kLanes] = {};
            for (int64_t key = 0; key < len; ++key) {
                Vec<A> v;
                load<A>(v, values.data + key * values.stride + d);
                for (int64_t i = 0; i < kLanes; ++i) sum[i] += weights[key * queries + r + i] * v;
            }
            for (int64_t i = 0; i < kLanes; ++i) store<A>(out + (r + i) * width + d, sum[i]);
        }
    }
}

template <typename A>
void add_own(const Matrix<A>& values, int64_t len, const A* weights, int64_t queries, int64_t width, A* out) {
    for (int64_t d = 0; d < width; d += kLanes) {
        Vec<A> even, odd = {}, v;
        load<A>(even, out + d);
        int64_t key = 0;
        for (; key + 2 <= len; key += 2) {
            load<A>(v, values.data + key * values.stride + d);
            even += weights[key * queries] * v;
            load<A>(v, values.data + (key + 1) * values.stride + d);
            odd += weights[(key + 1) * queries] * v;
        }
        if (key < len) {
            load<A>(v, values.data + key * values.stride + d);
            even += weights[key * queries] * v;
        }
        store<A>(out + d, even + odd);
    }
}

template <typename T, typename A>
void decode(const DecodeTask& task) {
    const int64_t num_queries = task.num_rows * task.repeats;
    const int64_t queries = (num_queries + kLanes - 1) / kLanes * kLanes;
    const int64_t width = (task.dim + kLanes - 1) / kLanes * kLanes;
    int64_t own_max = 0;
    for (int64_t g = 0; g < task.num_rows; ++g) own_max = task.own_k[g].len > own_max ? task.own_k[g].len : own_max;
    const int64_t prompt_len = task.prompt_k.len, len = prompt_len + own_max;

    A* q_query_dim = static_cast<A*>(task.scratch);
    A* q_dim_query = q_query_dim + queries * width;
    A* sums = q_dim_query + queries * width;
    A* out = sums + queries;
    A* scores = out + queries * width;
    A* free = scores + len * queries;

    memset(q_query_dim, 0, sizeof(A) * 2 * queries * width);
    for (int64_t i = 0; i < num_queries; ++i) {
        const T* from = static_cast<const T*>(task.q) + i / task.repeats * task.q_row_stride +
                        i % task.repeats * task.q_head_stride;
        for (int64_t d = 0; d < task.dim; ++d) {
            const A x = widen(from[d]) * static_cast<A>(task.scale);
            q_query_dim[i * width + d] = x;
            q_dim_query[d * queries + i] = x;
        }
    }

    A* const reused = free;  // prompt keys, then prompt values, then each row's own
    const Matrix<A> prompt_k = entries<T, A>(task.prompt_k, task.dim, width, free);
    score_prompt(prompt_k, prompt_len, q_dim_query, queries, task.dim, scores);
    A* own_scores = scores + prompt_len * queries;
    for (int64_t i = 0; i < own_max * queries; ++i) own_scores[i] = -static_cast<A>(INFINITY);
    for (int64_t g = 0; g < task.num_rows; ++g) {
        free = reused;
        const Matrix<A> keys = entries<T, A>(task.own_k[g], task.dim, width, free);
        for (int64_t i = g * task.repeats; i < (g + 1) * task.repeats; ++i) {
            score_own(keys, task.own_k[g].len, q_query_dim + i * width, queries, width, own_scores + i);
        }
    }

    weigh(scores, len, queries, sums);

    free = reused;
    const Matrix<A> prompt_v = entries<T, A>(task.prompt_v, task.dim, width, free);
    sum_prompt(prompt_v, prompt_len, scores, queries, width, out);
    for (int64_t g = 0; g < task.num_rows; ++g) {
        free = reused;
        const Matrix<A> values = entries<T, A>(task.own_v[g], task.dim, width, free);
        for (int64_t i = g * task.repeats; i < (g + 1) * task.repeats; ++i) {
            add_own(values, task.own_v[g].len, own_scores + i, queries, width, out + i * width);
        }
    }
    for (int64_t i = 0; i < num_queries; ++i) {
        T* to = static_cast<T*>(task.out) + i / task.repeats * task.out_row_stride +
                i % task.repeats * task.out_head_stride;
        for (int64_t d = 0; d < task.dim; ++d) narrow(to + d, out[i * width + d] / sums[i]);
    }
}

}  // namespace

DecodeFn decode_fn(Storage storage) {
    switch (storage) {
        case Storage::kFloat32: return &decode<float, float>;
        case Storage::kFloat64: return &decode<double, double>;
        case Storage::kBFloat16: return &decode<BFloat16, float>;
    }
    return nullptr;
}

}  // namespace ISOMORPH_ISA
}  // namespace isomorph
