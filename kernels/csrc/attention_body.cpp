// Flash attention over packed rows, in float32 for every storage type (float64 for float64). Blocks of keys and values
// and the queries that attend to them are converted into scratch that fits the L2 cache; all products use one loop over
// register tiles. The sums of a query run in the order of its keys, those of a key in the order of its queries.
#include "attention.h"

#include "lanes.h"

namespace isomorph {
namespace ISOMORPH_ISA {
namespace {

// A register tile of sums: rows x vectors of columns. 24 of AVX-512's 32 registers, 12 of AVX2's 16.
constexpr int kTileRows = 6;
template <typename A>
constexpr int kTileVectors = sizeof(A) * kLanes == 64 ? 4 : 2;

// c[R, V vectors] = or += a b. a[r, k] at a[r * a_row + k * a_col]; b and c have rows of contiguous columns.
template <int R, int V, bool kAdds, typename A>
ISOMORPH_INLINE void multiply_tile(const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row, int64_t depth, A* c,
                                   int64_t c_row) {
    Vec<A> sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = kAdds ? load<Vec<A>>(c + r * c_row + v * kLanes) : Vec<A>{};
    }
    for (int64_t k = 0; k < depth; ++k, a += a_col, b += b_row) {
        Vec<A> right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) right[v] = load<Vec<A>>(b + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const A left = a[r * a_row];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
    }
}

template <int V, bool kAdds, typename A>
void multiply_columns(const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row, int64_t rows, int64_t depth,
                      A* c, int64_t c_row) {
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
        multiply_tile<kTileRows, V, kAdds>(a + r * a_row, a_row, a_col, b, b_row, depth, c + r * c_row, c_row);
    }
    for (; r + 2 <= rows; r += 2) {
        multiply_tile<2, V, kAdds>(a + r * a_row, a_row, a_col, b, b_row, depth, c + r * c_row, c_row);
    }
    if (r < rows) multiply_tile<1, V, kAdds>(a + r * a_row, a_row, a_col, b, b_row, depth, c + r * c_row, c_row);
}

// c [rows, columns] = or += a [rows, depth] b [depth, columns]; columns is a multiple of kLanes.
template <bool kAdds, typename A>
void multiply(const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row, int64_t rows, int64_t depth,
              int64_t columns, A* c, int64_t c_row) {
    constexpr int V = kTileVectors<A>;
    int64_t n = 0;
    for (; n + V * kLanes <= columns; n += V * kLanes) {
        multiply_columns<V, kAdds>(a, a_row, a_col, b + n, b_row, rows, depth, c + n, c_row);
    }
    for (; n < columns; n += kLanes) {
        multiply_columns<1, kAdds>(a, a_row, a_col, b + n, b_row, rows, depth, c + n, c_row);
    }
}

template <typename A>
ISOMORPH_INLINE A max_of(const Vec<A>& x) {
    A part[kLanes];
    store(part, x);
    for (int64_t n = kLanes / 2; n > 0; n /= 2) {
        for (int64_t i = 0; i < n; ++i) part[i] = part[i] > part[i + n] ? part[i] : part[i + n];
    }
    return part[0];
}

// Loads at most kKeys keys as rows [key, width], and as columns [width, kKeys] with zeros for missing keys.
template <typename T, typename A>
void load_keys(const Heads& heads, int64_t head, int64_t first, int64_t num_keys, int64_t dim, int64_t width, A* rows,
               A* columns) {
    for (int64_t j = 0; j < num_keys; ++j) widen_row(row_of<T>(heads, first + j, head), dim, width, A(1), rows + j * width);
    if (columns == nullptr) return;
    for (int64_t d = 0; d < width; ++d) {
        for (int64_t j = 0; j < num_keys; ++j) columns[d * kKeys + j] = rows[j * width + d];
        for (int64_t j = num_keys; j < kKeys; ++j) columns[d * kKeys + j] = 0;
    }
}

// Online softmax: replaces the scores of a block by weights relative to the row's new maximum, and rescales its sums.
template <typename A>
ISOMORPH_INLINE void weigh(A* scores, int64_t num_seen, A* top, A* sum, A* out, int64_t width) {
    for (int64_t j = num_seen; j < kKeys; ++j) scores[j] = -static_cast<A>(INFINITY);
    Vec<A> most = Vec<A>{} + *top;
    for (int64_t j = 0; j < kKeys; j += kLanes) {
        const Vec<A> x = load<Vec<A>>(scores + j);
        most = x > most ? x : most;
    }
    const A now = max_of<A>(most);
    Vec<A> added = {};
    for (int64_t j = 0; j < kKeys; j += kLanes) {
        Vec<A> x = load<Vec<A>>(scores + j) - now;
        exp_in_place(x);
        added += x;
        store(scores + j, x);
    }
    Vec<A> shrink = Vec<A>{} + (*top - now);
    exp_in_place(shrink);
    *sum = *sum * shrink[0] + sum_of<A>(added);
    if (now > *top) {
        for (int64_t d = 0; d < width; d += kLanes) store(out + d, load<Vec<A>>(out + d) * shrink);
    }
    *top = now;
}

ISOMORPH_INLINE float log_of(float x) { return logf(x); }
ISOMORPH_INLINE double log_of(double x) { return log(x); }

template <typename T, typename A>
void forward(const Attention& task, int64_t segment, int64_t first, int64_t last, int64_t kv_head, void* scratch) {
    const int64_t dim = task.dim, width = (dim + kLanes - 1) / kLanes * kLanes, repeats = task.repeats;
    const int64_t num_rows = (last - first) * repeats;
    A* q = static_cast<A*>(scratch);
    A* out = q + num_rows * width;
    A* scores = out + num_rows * width;
    A* tops = scores + num_rows * kKeys;
    A* sums = tops + num_rows;
    A* rows = sums + num_rows;
    A* columns = rows + kKeys * width;
    for (int64_t i = 0; i < num_rows; ++i) {
        const T* from = row_of<T>(task.q, first + i / repeats, kv_head * repeats + i % repeats);
        widen_row(from, dim, width, static_cast<A>(task.scale), q + i * width);
        tops[i] = -static_cast<A>(INFINITY), sums[i] = 0;
    }
    memset(out, 0, sizeof(A) * num_rows * width);

    // The segment's own keys come first: at least one is visible to every row, so the maximum is finite from then on.
    for (int64_t s = segment; s >= 0; s = task.segments[s].parent) {
        const int64_t end = s == segment ? last : task.segments[s].end;
        for (int64_t block = task.segments[s].start; block < end; block += kKeys) {
            const int64_t num_keys = end - block < kKeys ? end - block : kKeys;
            // no key of the block is visible to rows before its first key
            const int64_t from = s == segment && block > first ? (block - first) * repeats : 0, num = num_rows - from;
            load_keys<T>(task.k, kv_head, block, num_keys, dim, width, rows, columns);
            multiply<false>(q + from * width, width, 1, columns, kKeys, num, width, kKeys, scores, kKeys);
            for (int64_t i = 0; i < num; ++i) {
                const int64_t seen = s == segment ? first + (from + i) / repeats - block + 1 : num_keys;
                weigh(scores + i * kKeys, seen < num_keys ? seen : num_keys, tops + from + i, sums + from + i,
                      out + (from + i) * width, width);
            }
            load_keys<T, A>(task.v, kv_head, block, num_keys, dim, width, rows, nullptr);
            multiply<true>(scores, kKeys, 1, rows, width, num, num_keys, width, out + from * width, width);
        }
    }

    for (int64_t i = 0; i < num_rows; ++i) {
        const int64_t token = first + i / repeats, head = kv_head * repeats + i % repeats;
        T* to = row_of<T>(task.out, token, head);
        for (int64_t d = 0; d < dim; ++d) narrow(to + d, out[i * width + d] / sums[i]);
        static_cast<A*>(task.lse)[token * task.num_heads + head] = tops[i] + log_of(sums[i]);
    }
}

template <typename T, typename A>
void delta(const Attention& task, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
        for (int64_t head = 0; head < task.num_heads; ++head) {
            const T *out = row_of<T>(task.out, token, head), *dout = row_of<T>(task.dout, token, head);
            A sum = 0;
            for (int64_t d = 0; d < task.dim; ++d) sum += widen(dout[d]) * widen(out[d]);
            static_cast<A*>(task.delta)[token * task.num_heads + head] = sum;
        }
    }
}

// One query: replaces its scores by attention weights, and their gradients by those of the scores; 0 for keys from
// num_visible on.
template <typename A>
ISOMORPH_INLINE void score_gradients(A* weights, A* gradients, A lse, A delta, int64_t num_visible, int64_t num_keys) {
    for (int64_t j = 0; j < kKeys; j += kLanes) {
        Vec<A> x = load<Vec<A>>(weights + j) - lse;
        exp_in_place(x);
        store(weights + j, x);
        store(gradients + j, x * (load<Vec<A>>(gradients + j) - delta));
    }
    for (int64_t j = num_visible; j < num_keys; ++j) weights[j] = 0, gradients[j] = 0;
}

template <typename T, typename A>
void backward(const Attention& task, int64_t first, int64_t last, int64_t head, void* scratch) {
    const int64_t dim = task.dim, width = (dim + kLanes - 1) / kLanes * kLanes, kv_head = head / task.repeats;
    const int64_t num_heads = task.num_heads;
    const A scale = static_cast<A>(task.scale);
    const A *lse = static_cast<const A*>(task.lse), *deltas = static_cast<const A*>(task.delta);
    A* q = static_cast<A*>(scratch);
    A* dout = q + kQueries * width;
    A* dq = dout + kQueries * width;
    A* weights = dq + kQueries * width;
    A* dscores = weights + kQueries * kKeys;
    A* k_rows = dscores + kQueries * kKeys;
    A* k_columns = k_rows + kKeys * width;
    A* v_columns = k_columns + kKeys * width;
    A* dk = v_columns + kKeys * width;
    A* dv = dk + kKeys * width;
    for (int64_t token = task.segments[first].start; token < task.segments[last - 1].end; ++token) {
        memset(row_of<A>(task.dq, token, head), 0, sizeof(A) * dim);
    }

    for (int64_t s = first; s < last; ++s) {
        const Segment segment = task.segments[s];
        for (int64_t block = segment.start; block < segment.end; block += kKeys) {
            const int64_t num_keys = segment.end - block < kKeys ? segment.end - block : kKeys;
            load_keys<T>(task.v, kv_head, block, num_keys, dim, width, k_rows, v_columns);
            load_keys<T>(task.k, kv_head, block, num_keys, dim, width, k_rows, k_columns);
            memset(dk, 0, sizeof(A) * 2 * kKeys * width);
            for (int64_t query = block; query < segment.vis_end; query += kQueries) {
                const int64_t num = segment.vis_end - query < kQueries ? segment.vis_end - query : kQueries;
                for (int64_t i = 0; i < num; ++i) {
                    widen_row(row_of<T>(task.q, query + i, head), dim, width, scale, q + i * width);
                    widen_row(row_of<T>(task.dout, query + i, head), dim, width, A(1), dout + i * width);
                }
                multiply<false>(q, width, 1, k_columns, kKeys, num, width, kKeys, weights, kKeys);
                multiply<false>(dout, width, 1, v_columns, kKeys, num, width, kKeys, dscores, kKeys);
                for (int64_t i = 0; i < num; ++i) {
                    const int64_t at = (query + i) * num_heads + head, seen = query + i - block + 1;
                    score_gradients(weights + i * kKeys, dscores + i * kKeys, lse[at], deltas[at], seen, num_keys);
                }
                multiply<true>(weights, 1, kKeys, dout, width, num_keys, num, width, dv, width);
                multiply<true>(dscores, 1, kKeys, q, width, num_keys, num, width, dk, width);
                multiply<false>(dscores, kKeys, 1, k_rows, width, num, num_keys, width, dq, width);
                for (int64_t i = 0; i < num; ++i) {
                    A* into = row_of<A>(task.dq, query + i, head);
                    for (int64_t d = 0; d < dim; ++d) into[d] += scale * dq[i * width + d];
                }
            }
            for (int64_t j = 0; j < num_keys; ++j) {
                memcpy(row_of<A>(task.dk, block + j, head), dk + j * width, sizeof(A) * dim);
                memcpy(row_of<A>(task.dv, block + j, head), dv + j * width, sizeof(A) * dim);
            }
        }
    }
}

template <typename T, typename A>
AttentionFns fns() {
    return {&forward<T, A>, &delta<T, A>, &backward<T, A>};
}

}  // namespace

AttentionFns attention_fns(Storage storage) {
    switch (storage) {
        case Storage::kFloat32: return fns<float, float>();
        case Storage::kFloat64: return fns<double, double>();
        case Storage::kBFloat16: return fns<BFloat16, float>();
        case Storage::kFloat16: break;  // refused before
    }
    return {};
}

}  // namespace ISOMORPH_ISA
}  // namespace isomorph
