// A task of decode attention: rows with the same prompt, one KV head. The specification is kernels/decode_attention.py.
// Compiled once per instruction set.
#pragma once

#include <stdint.h>

#include "storage.h"

namespace isomorph {

// The keys, or the values, of one slot and KV head of a cache [S, K, L, D] that a row attends to.
struct Entries {
    Heads cache;
    int64_t slot, kv_head;
    int64_t stride;  // in elements, from one entry to the next
    int64_t len;
};

struct DecodeTask {
    int64_t num_rows;
    int64_t repeats;  // query heads per KV head
    int64_t dim;
    double scale;
    Heads q, out;  // all rows and heads
    int64_t first_row, first_head;  // of this task
    Entries prompt_k, prompt_v;
    const Entries* own_k;  // [num_rows]
    const Entries* own_v;
    void* scratch;
};

using DecodeFn = void (*)(const DecodeTask&);

// Upper bound of the scratch bytes of a task of this size, for any number of lanes.
inline int64_t decode_scratch_bytes(int64_t num_queries, int64_t dim, int64_t prompt_len, int64_t own_len) {
    const int64_t queries = (num_queries + 15) / 16 * 16, width = (dim + 15) / 16 * 16;
    const int64_t copied = prompt_len > own_len ? prompt_len : own_len;
    const int64_t items = 3 * queries * width + queries + (prompt_len + own_len) * queries + copied * width;
    return items * static_cast<int64_t>(sizeof(double));
}

#define ISOMORPH_DECODE(isa)             \
    namespace isa {                      \
    DecodeFn decode_fn(Storage storage); \
    }
ISOMORPH_EACH_ISA(ISOMORPH_DECODE)
#undef ISOMORPH_DECODE

}  // namespace isomorph
