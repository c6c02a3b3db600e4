// Element types of arrays, and the strides of arrays with heads.
#pragma once

#include <stdint.h>

namespace isomorph {

enum class Storage { kFloat32, kFloat64, kBFloat16, kFloat16 };

// OF(isa) for every namespace that a *_body.cpp is compiled in.
#define ISOMORPH_EACH_ISA(OF) OF(baseline) OF(avx2) OF(avx512)

// An array [rows, heads, ...] whose last dimension is contiguous: rows are tokens, or slots of a KV cache.
struct Heads {
    void* data;
    int64_t row_stride, head_stride;  // in elements
};

}  // namespace isomorph
