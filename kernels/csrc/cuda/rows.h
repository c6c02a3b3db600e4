// Row kernels of the LM head in CUDA C++, a second implementation of kernels/gpu/rows.py to compare with. The
// specification is kernels/token_logprob.py. Built with -DISOMORPH_CUDA=ON.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace isomorph {
namespace cuda {

enum class RowType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Bias, statistics and their gradients are float32, or float64 for float64 logits. Pointers are not null unless noted.
struct Rows {
    void* data;
    RowType type;
    int64_t num_rows, num_columns, row_stride;  // columns are contiguous
};

struct Head {
    const int64_t* target;
    const void* bias;  // or null
    double inv_temperature;
};

struct Stats {
    void *logprob, *entropy, *lse;
};

struct StatGradients {
    const void *logprob, *entropy, *lse;  // each or null
};

// Both enqueue one kernel on the stream, and return the error of the launch.
cudaError_t row_stats(const Rows& logits, const Head& head, const Stats& out, cudaStream_t stream);
cudaError_t row_gradient(const Rows& logits, const Head& head, const Stats& stats, const StatGradients& grads,
                         const Rows& out, cudaStream_t stream);

}  // namespace cuda
}  // namespace isomorph
