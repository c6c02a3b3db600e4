// A thread block processes one row in blocks of columns of a fixed width. The assignment of columns to threads and the
// order of additions are fixed, so a row's bits do not depend on the batch. No atomics.
#include "rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace isomorph {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 16;  // columns per thread and block
constexpr int64_t kBlock = kThreads * kItems;

template <typename T>
struct WideOf {
    using type = float;
};
template <>
struct WideOf<double> {
    using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

template <typename T>
__device__ Wide<T> widen(T x) {
    return static_cast<Wide<T>>(x);
}
template <>
__device__ float widen(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <>
__device__ float widen(__half x) {
    return __half2float(x);
}

template <typename T>
__device__ T narrow(Wide<T> x) {
    return static_cast<T>(x);
}
template <>
__device__ __nv_bfloat16 narrow(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __half narrow(float x) {
    return __float2half_rn(x);
}

__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }
__device__ float logarithm(float x) { return logf(x); }
__device__ double logarithm(double x) { return log(x); }
__device__ float larger(float x, float y) { return fmaxf(x, y); }  // ignores NaN
__device__ double larger(double x, double y) { return fmax(x, y); }

template <typename T>
union Packet {  // 16 bytes, one load or store
    static constexpr int kSize = 16 / sizeof(T);
    uint4 bits;
    T item[kSize];
    __device__ Packet() {}
};

// Column of a thread's item i in the block that starts at `first`: packets of adjacent threads are adjacent.
template <typename T>
__device__ int64_t column_of(int64_t first, int i) {
    constexpr int kSize = Packet<T>::kSize;
    return first + (i / kSize * kThreads + static_cast<int>(threadIdx.x)) * kSize + i % kSize;
}

template <typename T>
__device__ bool moves_packets(const T* row) {
    return reinterpret_cast<uintptr_t>(row) % sizeof(uint4) == 0;
}

template <typename A>
struct Scale {
    const A* bias;
    A inv_temperature;
    __device__ A operator()(A logit, int64_t column) const {
        return (bias ? logit + bias[column] : logit) * inv_temperature;
    }
};

// z of this thread's items; -inf, a probability of 0, beyond the row. Loads by packets and by items give equal results.
template <typename T>
__device__ void load(const T* row, int64_t first, int64_t num_columns, bool packets, const Scale<Wide<T>>& scale,
                     Wide<T> (&z)[kItems]) {
    constexpr int kSize = Packet<T>::kSize;
#pragma unroll
    for (int start = 0; start < kItems; start += kSize) {
        const int64_t column = column_of<T>(first, start);
        Packet<T> packet;
        if (packets && column + kSize <= num_columns) {
            packet.bits = *reinterpret_cast<const uint4*>(row + column);
        } else {
#pragma unroll
            for (int i = 0; i < kSize; ++i) packet.item[i] = column + i < num_columns ? row[column + i] : T(0.0f);
        }
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const bool is_inside = column + i < num_columns;
            z[start + i] = is_inside ? scale(widen(packet.item[i]), column + i) : -Wide<T>(INFINITY);
        }
    }
}

template <typename A>
__device__ A block_sum(A x, A* shared) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < kWarps; ++warp) x += shared[warp];
    __syncthreads();
    return x;
}

template <typename A>
__device__ A block_max(A x, A* shared) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) x = larger(x, shared[warp]);
    __syncthreads();
    return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    stats_kernel(const T* logits, int64_t row_stride, int64_t num_columns, const int64_t* target, const Wide<T>* bias,
                 Wide<T> inv_temperature, Wide<T>* logprob, Wide<T>* entropy, Wide<T>* lse) {
    using A = Wide<T>;
    __shared__ A shared[kWarps];
    const int64_t n = blockIdx.x;
    const T* row = logits + n * row_stride;
    const Scale<A> scale = {bias, inv_temperature};
    const bool packets = moves_packets(row);
    A top = -A(INFINITY), total = 0, weighted = 0;  // of this thread: sum exp(z - top), sum exp(z - top) (z - top)
    for (int64_t first = 0; first < num_columns; first += kBlock) {
        A z[kItems];
        load(row, first, num_columns, packets, scale, z);
        A new_top = top;
#pragma unroll
        for (int i = 0; i < kItems; ++i) new_top = larger(new_top, z[i]);
        const A step = top == new_top ? A(0) : top - new_top, shrink = exponential(step);
        weighted = shrink * (weighted + (total > 0 ? total * step : A(0)));
        total *= shrink;
        top = new_top;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const A diff = z[i] == -A(INFINITY) ? z[i] : z[i] - top, e = exponential(diff);
            total += e;
            weighted += e == 0 ? A(0) : e * diff;
        }
    }
    const A row_top = block_max(top, shared);
    const A step = top == row_top ? A(0) : top - row_top, shrink = exponential(step);
    weighted = total == 0 ? A(0) : shrink * (weighted + (shrink == 0 ? A(0) : total * step));
    weighted = block_sum(weighted, shared);
    total = block_sum(shrink * total, shared);
    if (threadIdx.x > 0) return;
    const A log_total = logarithm(total), z = scale(widen(row[target[n]]), target[n]);
    logprob[n] = (z - row_top) - log_total;
    entropy[n] = log_total - weighted / total;
    // as torch.logsumexp: of -inf only log_total is -inf, with a NaN it is NaN
    lse[n] = isinf(row_top) && row_top > 0 ? row_top : row_top + log_total;
}

// In and Out may share storage, a narrower Out the first half of each row: block b of Out ends before column
// kBlock (b + 1) / 2 of In, which every thread has read at the barrier of iteration b.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const In* logits, int64_t row_stride, int64_t num_columns, const int64_t* target,
                    const Wide<In>* bias, Wide<In> inv_temperature, const Wide<In>* logprob, const Wide<In>* entropy,
                    const Wide<In>* dlogprob, const Wide<In>* dentropy, const Wide<In>* dlse, Out* out,
                    int64_t out_row_stride) {
    using A = Wide<In>;
    constexpr int kSize = Packet<In>::kSize, kOutSize = Packet<Out>::kSize;
    const int64_t n = blockIdx.x, y = target[n];
    const In* row = logits + n * row_stride;
    Out* out_row = out + n * out_row_stride;
    const Scale<A> scale = {bias, inv_temperature};
    const bool packets = moves_packets(row);
    const bool out_packets = moves_packets(out_row) && num_columns % kOutSize == 0;
    const A target_z = scale(widen(row[y]), y), row_logprob = logprob[n];
    const A z_y = target_z == -A(INFINITY) ? A(0) : target_z;  // logprob is -lse then
    const A at_target = dlogprob ? dlogprob[n] * inv_temperature : A(0);
    const A on_prob = (dlse ? dlse[n] * inv_temperature : A(0)) - at_target;
    const A on_surprise = dentropy ? -dentropy[n] * inv_temperature : A(0);
    const A row_entropy = dentropy ? entropy[n] : A(0);  // an unused entropy may be NaN
    __syncthreads();                                      // every thread has read z_y, which may be overwritten now
    for (int64_t first = 0; first < num_columns; first += kBlock) {
        A z[kItems];
        load(row, first, num_columns, packets, scale, z);
        if constexpr (sizeof(Out) < sizeof(In)) __syncthreads();  // other threads may not have read it yet
#pragma unroll
        for (int start = 0; start < kItems; start += kSize) {
            const int64_t column = column_of<In>(first, start);
            using Bytes = std::conditional_t<kSize * sizeof(Out) == 16, uint4, uint2>;
            static_assert(sizeof(Bytes) == kSize * sizeof(Out));
            union {
                Bytes bytes;  // aligned for one store
                Out item[kSize];
            } d;
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
                const A logp = (z[start + i] - z_y) + row_logprob, p = exponential(logp);
                const A factor = on_prob + on_surprise * (p == 0 ? A(0) : logp + row_entropy);
                d.item[i] = narrow<Out>(p * factor + (column + i == y ? at_target : A(0)));
            }
            if (out_packets && column + kSize <= num_columns) {
                *reinterpret_cast<Bytes*>(out_row + column) = d.bytes;
            } else {
#pragma unroll
                for (int i = 0; i < kSize; ++i)
                    if (column + i < num_columns) out_row[column + i] = d.item[i];
            }
        }
    }
}

template <typename T>
cudaError_t stats_of(const Rows& logits, const Head& head, const Stats& out, cudaStream_t stream) {
    using A = Wide<T>;
    stats_kernel<T><<<static_cast<unsigned>(logits.num_rows), kThreads, 0, stream>>>(
        static_cast<const T*>(logits.data), logits.row_stride, logits.num_columns, head.target,
        static_cast<const A*>(head.bias), static_cast<A>(head.inv_temperature), static_cast<A*>(out.logprob),
        static_cast<A*>(out.entropy), static_cast<A*>(out.lse));
    return cudaGetLastError();
}

template <typename In, typename Out>
cudaError_t gradient_of(const Rows& logits, const Head& head, const Stats& stats, const StatGradients& grads,
                        const Rows& out, cudaStream_t stream) {
    using A = Wide<In>;
    gradient_kernel<In, Out><<<static_cast<unsigned>(logits.num_rows), kThreads, 0, stream>>>(
        static_cast<const In*>(logits.data), logits.row_stride, logits.num_columns, head.target,
        static_cast<const A*>(head.bias), static_cast<A>(head.inv_temperature), static_cast<const A*>(stats.logprob),
        static_cast<const A*>(stats.entropy), static_cast<const A*>(grads.logprob),
        static_cast<const A*>(grads.entropy), static_cast<const A*>(grads.lse), static_cast<Out*>(out.data),
        out.row_stride);
    return cudaGetLastError();
}

}  // namespace

cudaError_t row_stats(const Rows& logits, const Head& head, const Stats& out, cudaStream_t stream) {
    switch (logits.type) {
        case RowType::kFloat32: return stats_of<float>(logits, head, out, stream);
        case RowType::kBFloat16: return stats_of<__nv_bfloat16>(logits, head, out, stream);
        case RowType::kFloat16: return stats_of<__half>(logits, head, out, stream);
        case RowType::kFloat64: return stats_of<double>(logits, head, out, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t row_gradient(const Rows& logits, const Head& head, const Stats& stats, const StatGradients& grads,
                         const Rows& out, cudaStream_t stream) {
    if (logits.type == RowType::kFloat32 && out.type == RowType::kBFloat16)
        return gradient_of<float, __nv_bfloat16>(logits, head, stats, grads, out, stream);
    if (logits.type != out.type) return cudaErrorInvalidValue;
    switch (logits.type) {
        case RowType::kFloat32: return gradient_of<float, float>(logits, head, stats, grads, out, stream);
        case RowType::kBFloat16:
            return gradient_of<__nv_bfloat16, __nv_bfloat16>(logits, head, stats, grads, out, stream);
        case RowType::kFloat16: return gradient_of<__half, __half>(logits, head, stats, grads, out, stream);
        case RowType::kFloat64: return gradient_of<double, double>(logits, head, stats, grads, out, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace isomorph
