// What an array holds, and where the rows of its heads lie.
#pragma once

#include <stdint.h>

namespace isomorph {

enum class Storage { kFloat32, kFloat64, kBFloat16, kFloat16 };

// [rows, heads, ...]: tokens and their heads, or slots of a cache and theirs. The last dimension is contiguous.
struct Heads {
    void* data;
    int64_t row_stride, head_stride;  // in elements
};

}  // namespace isomorph
