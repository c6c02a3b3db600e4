// Tasks of packed attention. The specification is kernels/packed_attention.py; the mask is that of packed_layout.py:
//     key k is visible to query q  iff  k <= q < vis_end of k's segment
// Compiled once per instruction set.
#pragma once

#include <stdint.h>

#include "storage.h"

namespace isomorph {

// Packed rows [start, end). Its keys are visible to queries before vis_end; it continues segment parent, or none (-1).
struct Segment {
    int64_t start, end, vis_end, parent;
};

struct Attention {
    const Segment* segments;
    int64_t num_heads, repeats, dim;  // repeats: query heads per KV head
    double scale;
    Heads q, k, v, out;  // rows are tokens
    void* lse;  // [T, num_heads]; float64 for float64, else float32, like the members below
    // for the backward
    Heads dout;
    void* delta;                       // [T, num_heads] sum of dout * out
    Heads dq, dk, dv;                  // [T, num_heads, dim] each; dk and dv per query head
};

constexpr int64_t kKeys = 64;      // per block
constexpr int64_t kQueries = 192;  // rows of scores per block: tokens, or in the forward tokens x repeats

// Upper bound of the scratch bytes of a task, for any number of lanes.
inline int64_t attention_scratch_bytes(int64_t dim, int64_t repeats) {
    const int64_t width = (dim + 15) / 16 * 16, rows = kQueries > repeats ? kQueries : repeats;
    const int64_t items = rows * (3 * width + 2 * kKeys + 2) + kKeys * 5 * width;
    return items * static_cast<int64_t>(sizeof(double));
}

// Computes out and lse of the tokens [first, last) of a segment, for the query heads of one KV head.
using ForwardFn = void (*)(const Attention&, int64_t segment, int64_t first, int64_t last, int64_t kv_head,
                           void* scratch);
// Computes delta of the tokens [first, last).
using DeltaFn = void (*)(const Attention&, int64_t first, int64_t last);
// Computes dq, dk and dv of the segments [first, last), one complete group, for one query head.
using BackwardFn = void (*)(const Attention&, int64_t first, int64_t last, int64_t head, void* scratch);

struct AttentionFns {
    ForwardFn forward;
    DeltaFn delta;
    BackwardFn backward;
};

#define ISOMORPH_ATTENTION(isa)                  \
    namespace isa {                              \
    AttentionFns attention_fns(Storage storage); \
    }
ISOMORPH_EACH_ISA(ISOMORPH_ATTENTION)
#undef ISOMORPH_ATTENTION

}  // namespace isomorph
