// Scores are stored as [key, query], so that a vector register holds queries of a group and a key of the prompt is read
// once for all of them. A row's own keys are used by its few query heads only: there vectors run along dim. bfloat16 is
// converted when it is loaded, except for a prompt's keys, which are converted once for all queries.
#include "decode.h"

#include "lanes.h"

namespace isomorph {
namespace ISOMORPH_ISA {
namespace {

template <typename T>
struct Matrix {
    const T* data;
    int64_t stride;
};

// Entries in their storage type, [len, width] with zeros beyond dim: in place, or copied to scratch.
template <typename T>
Matrix<T> stored(const Entries& entries, int64_t dim, int64_t width, void* scratch) {
    const T* data = row_of<const T>(entries.cache, entries.slot, entries.kv_head);
    if (dim == width) return {data, entries.stride};
    T* copy = static_cast<T*>(scratch);
    memset(static_cast<void*>(copy), 0, sizeof(T) * entries.len * width);
    for (int64_t i = 0; i < entries.len; ++i) memcpy(copy + i * width, data + i * entries.stride, sizeof(T) * dim);
    return {copy, width};
}

// Entries converted to A, [len, dim].
template <typename T, typename A>
Matrix<A> widened(const Entries& entries, int64_t dim, int64_t width, void* scratch) {
    const T* data = row_of<const T>(entries.cache, entries.slot, entries.kv_head);
    if constexpr (__is_same(T, A)) return {data, entries.stride};
    A* copy = static_cast<A*>(scratch);
    for (int64_t i = 0; i < entries.len; ++i) widen_row(data + i * entries.stride, dim, width, A(1), copy + i * width);
    return {copy, width};
}

// scores[key, query] = keys . queries, for NK keys and one vector of queries.
template <int NK, typename A>
ISOMORPH_INLINE void score_block(const Matrix<A>& keys, int64_t first, const A* q_dim_query, int64_t queries, int64_t dim,
                                 A* scores) {
    Vec<A> sum[NK] = {};
    for (int64_t d = 0; d < dim; ++d) {
        const Vec<A> q = load<Vec<A>>(q_dim_query + d * queries);
        for (int i = 0; i < NK; ++i) sum[i] += keys.data[(first + i) * keys.stride + d] * q;
    }
    for (int i = 0; i < NK; ++i) store(scores + (first + i) * queries, sum[i]);
}

template <typename A>
void score_prompt(const Matrix<A>& keys, int64_t len, const A* q_dim_query, int64_t queries, int64_t dim, A* scores) {
    for (int64_t r = 0; r < queries; r += kLanes) {
        int64_t key = 0;
        for (; key + 8 <= len; key += 8) score_block<8>(keys, key, q_dim_query + r, queries, dim, scores + r);
        for (; key < len; ++key) score_block<1>(keys, key, q_dim_query + r, queries, dim, scores + r);
    }
}

// scores[key, one query] = keys . query, for NK keys: independent accumulators hide instruction latency.
template <int NK, typename T, typename A>
ISOMORPH_INLINE void dot_block(const Matrix<T>& keys, int64_t first, const A* query, int64_t queries, int64_t width,
                               A* scores) {
    Vec<A> sum[NK] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
        const Vec<A> q = load<Vec<A>>(query + d);
        for (int i = 0; i < NK; ++i) sum[i] += wide<A>(keys.data + (first + i) * keys.stride + d) * q;
    }
    for (int i = 0; i < NK; ++i) scores[(first + i) * queries] = sum_of<A>(sum[i]);
}

template <typename T, typename A>
void score_own(const Matrix<T>& keys, int64_t len, const A* query, int64_t queries, int64_t width, A* scores) {
    int64_t key = 0;
    for (; key + 4 <= len; key += 4) dot_block<4>(keys, key, query, queries, width, scores);
    for (; key < len; ++key) dot_block<1>(keys, key, query, queries, width, scores);
}

// Replaces scores by weights, not yet divided by their sums.
template <typename A>
void weigh(A* scores, int64_t len, int64_t queries, A* sums) {
    for (int64_t r = 0; r < queries; r += kLanes) {
        Vec<A> top = Vec<A>{} - static_cast<A>(INFINITY), sum = {};
        for (int64_t key = 0; key < len; ++key) {
            const Vec<A> x = load<Vec<A>>(scores + key * queries + r);
            top = x > top ? x : top;
        }
        for (int64_t key = 0; key < len; ++key) {
            Vec<A> x = load<Vec<A>>(scores + key * queries + r) - top;
            exp_in_place(x);
            sum += x;
            store(scores + key * queries + r, x);
        }
        store(sums + r, sum);
    }
}

// out[query, dim] = weights of eight queries . values, one vector of dim at a time.
template <typename T, typename A>
void sum_prompt(const Matrix<T>& values, int64_t len, const A* weights, int64_t queries, int64_t width, A* out) {
    constexpr int64_t kQueries = 8;
    for (int64_t r = 0; r < queries; r += kQueries) {
        for (int64_t d = 0; d < width; d += kLanes) {
            Vec<A> sum[kQueries] = {};
            for (int64_t key = 0; key < len; ++key) {
                const Vec<A> v = wide<A>(values.data + key * values.stride + d);
                for (int64_t i = 0; i < kQueries; ++i) sum[i] += weights[key * queries + r + i] * v;
            }
            for (int64_t i = 0; i < kQueries; ++i) store(out + (r + i) * width + d, sum[i]);
        }
    }
}

template <typename T, typename A>
void add_own(const Matrix<T>& values, int64_t len, const A* weights, int64_t queries, int64_t width, A* out) {
    for (int64_t d = 0; d < width; d += kLanes) {
        Vec<A> even = load<Vec<A>>(out + d), odd = {};
        int64_t key = 0;
        for (; key + 2 <= len; key += 2) {
            even += weights[key * queries] * wide<A>(values.data + key * values.stride + d);
            odd += weights[(key + 1) * queries] * wide<A>(values.data + (key + 1) * values.stride + d);
        }
        if (key < len) even += weights[key * queries] * wide<A>(values.data + key * values.stride + d);
        store(out + d, even + odd);
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
    A* scratch = scores + len * queries;

    memset(q_query_dim, 0, sizeof(A) * 2 * queries * width);
    for (int64_t i = 0; i < num_queries; ++i) {
        const T* from = row_of<const T>(task.q, task.first_row + i / task.repeats, task.first_head + i % task.repeats);
        widen_row(from, task.dim, width, static_cast<A>(task.scale), q_query_dim + i * width);
        for (int64_t d = 0; d < task.dim; ++d) q_dim_query[d * queries + i] = q_query_dim[i * width + d];
    }

    // scratch is reused for prompt keys, prompt values, and the entries of each row
    const Matrix<A> prompt_k = widened<T, A>(task.prompt_k, task.dim, width, scratch);
    score_prompt(prompt_k, prompt_len, q_dim_query, queries, task.dim, scores);
    A* own_scores = scores + prompt_len * queries;
    for (int64_t i = 0; i < own_max * queries; ++i) own_scores[i] = -static_cast<A>(INFINITY);
    for (int64_t g = 0; g < task.num_rows; ++g) {
        const Matrix<T> keys = stored<T>(task.own_k[g], task.dim, width, scratch);
        for (int64_t i = g * task.repeats; i < (g + 1) * task.repeats; ++i) {
            score_own(keys, task.own_k[g].len, q_query_dim + i * width, queries, width, own_scores + i);
        }
    }

    weigh(scores, len, queries, sums);

    const Matrix<T> prompt_v = stored<T>(task.prompt_v, task.dim, width, scratch);
    sum_prompt(prompt_v, prompt_len, scores, queries, width, out);
    for (int64_t g = 0; g < task.num_rows; ++g) {
        const Matrix<T> values = stored<T>(task.own_v[g], task.dim, width, scratch);
        for (int64_t i = g * task.repeats; i < (g + 1) * task.repeats; ++i) {
            add_own(values, task.own_v[g].len, own_scores + i, queries, width, out + i * width);
        }
    }
    for (int64_t i = 0; i < num_queries; ++i) {
        T* to = row_of<T>(task.out, task.first_row + i / task.repeats, task.first_head + i % task.repeats);
        const bool sees_nothing = prompt_len + task.own_k[i / task.repeats].len == 0;
        for (int64_t d = 0; d < task.dim; ++d) narrow(to + d, sees_nothing ? A(0) : out[i * width + d] / sums[i]);
    }
}

}  // namespace

DecodeFn decode_fn(Storage storage) {
    switch (storage) {
        case Storage::kFloat32: return &decode<float, float>;
        case Storage::kFloat64: return &decode<double, double>;
        case Storage::kBFloat16: return &decode<BFloat16, float>;
        case Storage::kFloat16: break;  // refused before
    }
    return nullptr;
}

}  // namespace ISOMORPH_ISA
}  // namespace isomorph
