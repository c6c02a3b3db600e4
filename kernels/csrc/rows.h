// One block of columns of a row of logits. z = (logits + bias) / temperature; the specification is
// token_logprob_ref. Blocks start at fixed columns, so a row's bits do not depend on the batch.
#pragma once

#include <stdint.h>

#include "storage.h"

namespace isomorph {

constexpr int64_t kRowBlock = 1024;  // columns; in float32 it fits the L1 cache

template <typename A>
struct RowScale {
    const A* bias;  // [V] or null
    A inv_temperature;
};

// sum exp(z - top) and sum exp(z - top) (z - top). A block with only -inf has top -inf and sums 0.
struct BlockStats {
    double top, sum, weighted;
};

template <typename A>
struct RowGradient {
    A z_target, logprob, entropy, dlogprob, dentropy, dlse;
    int64_t target;
};

// The column with the largest z + noise (the noise of sample_token_ref), and the terms of its log-probability.
struct BlockDraw {
    double top, sum;  // as in BlockStats
    double score, z;  // of the column
    int64_t column;
};

#define ISOMORPH_ROWS(isa)                                                                                             \
    namespace isa {                                                                                                    \
    template <typename A>                                                                                              \
    struct RowsBody {                                                                                                  \
        static A z_at(const void* row, Storage type, int64_t column, const RowScale<A>& scale);                        \
        static BlockStats stats(const void* row, Storage type, int64_t first, int64_t num_columns,                     \
                                const RowScale<A>& scale);                                                             \
        static void gradient(const void* row, Storage type, int64_t first, int64_t num_columns,                        \
                             const RowScale<A>& scale, const RowGradient<A>& grad, void* out, Storage out_type);       \
        static BlockDraw draw(const void* row, Storage type, int64_t first, int64_t num_columns,                       \
                              const RowScale<A>& scale, int64_t rng_key, int64_t position);                                \
    };                                                                                                                 \
    }
ISOMORPH_EACH_ISA(ISOMORPH_ROWS)
#undef ISOMORPH_ROWS

}  // namespace isomorph
