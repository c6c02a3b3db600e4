// RMS norm, SwiGLU and rotary embedding on a block of rows. The specifications are kernels/rms_norm.py, swiglu.py and
// rotary.py; roundings to the storage type are those of kernels/gpu/layer.py. Storage is float32 or bfloat16, sums and
// products are float32. A row's bits do not depend on the other rows.
#pragma once

#include <stdint.h>

#include "storage.h"

namespace isomorph {

// Arrays [num_rows, dim], contiguous; weight [dim]; rstd [num_rows], 1 / root mean square.
struct Norm {
    Storage type;
    int64_t num_rows, dim;
    const void* weight;
};

// Rotates heads [num_heads, 2 half] of one token; cos and sin [2 half], of angle_type.
struct Rotation {
    Storage type, angle_type;  // the same, or bfloat16 and float32
    int64_t half;
    const void *cos, *sin;
    bool transposed;  // the transposed rotation: the gradient
};

#define ISOMORPH_LAYER(isa)                                                                                            \
    namespace isa {                                                                                                    \
    struct LayerBody {                                                                                                 \
        /* y = weight * normalised sum; total = residual + x, not written without a residual */                        \
        static void norm(const Norm& norm, const void* x, const void* residual, float eps, void* y, void* total,       \
                         float* rstd);                                                                                 \
        /* dx, and dweight [dim] summed over the rows; dtotal may be null */                                           \
        static void norm_gradient(const Norm& norm, const void* total, const float* rstd, const void* dy,              \
                                  const void* dtotal, void* dx, float* dweight);                                       \
        static void swiglu(Storage type, const void* gate, const void* up, int64_t size, void* y);                     \
        static void swiglu_gradient(Storage type, const void* gate, const void* up, const void* dy, int64_t size,      \
                                    void* dgate, void* dup);                                                           \
        static void rotate(const Rotation& rotation, const void* x, int64_t head_stride, int64_t num_heads,            \
                           void* out);                                                                                 \
    };                                                                                                                 \
    }
ISOMORPH_EACH_ISA(ISOMORPH_LAYER)
#undef ISOMORPH_LAYER

}  // namespace isomorph
