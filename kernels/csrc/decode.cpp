// Decode attention: tasks over prompts, KV heads and rows. The specification is kernels/decode_attention.py.
#include "decode.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "native.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

using Array = nb::ndarray<nb::device::cpu>;
using Lens = nb::ndarray<const int64_t, nb::device::cpu, nb::c_contig>;

constexpr int64_t kQueriesPerTask = 32;

DecodeFn decode_fn(Storage storage) {
#if defined(ISOMORPH_HAS_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::decode_fn(storage);
#endif
    return baseline::decode_fn(storage);
}

Storage storage_of(const Array& array) {
    const nb::dlpack::dtype dtype = array.dtype();
    if (dtype == nb::dtype<float>()) return Storage::kFloat32;
    if (dtype == nb::dtype<double>()) return Storage::kFloat64;
    if (dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16) return Storage::kBFloat16;
    throw nb::type_error("decode_attention: float32, float64 or bfloat16");
}

// Address of element (i, j) or (i, j, k) of the first dimensions.
const void* at(const Array& array, int64_t i, int64_t j, int64_t k = 0) {
    const int64_t offset = i * array.stride(0) + j * array.stride(1) + k * array.stride(2);
    return static_cast<const char*>(array.data()) + offset * static_cast<int64_t>(array.itemsize());
}

void decode_attention(Array q, Array k_prompt, Array v_prompt, Lens prompt_len, Array k_own, Array v_own, Lens own_len,
                      double scale, Array out) {
    const DecodeFn decode = decode_fn(storage_of(q));
    const int64_t num_prompts = q.shape(0), num_rows = q.shape(1), num_heads = q.shape(2), dim = q.shape(3);
    const int64_t num_kv_heads = k_prompt.shape(1), repeats = num_heads / num_kv_heads;
    const int64_t rows_per_task = std::max<int64_t>(1, kQueriesPerTask / repeats);
    const int64_t num_chunks = (num_rows + rows_per_task - 1) / rows_per_task;
    const int64_t scratch_bytes =
        decode_scratch_bytes(rows_per_task * repeats, dim, k_prompt.shape(2), k_own.shape(3));
    const int64_t num_tasks = num_prompts * num_kv_heads * num_chunks;
    nb::gil_scoped_release release;
#pragma omp parallel
    {
        const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64),
                                                             &std::free);
        std::vector<Rows> own_k(rows_per_task), own_v(rows_per_task);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_tasks; ++i) {
            const int64_t p = i / (num_kv_heads * num_chunks), head = i / num_chunks % num_kv_heads;
            const int64_t first = i % num_chunks * rows_per_task, n = std::min(rows_per_task, num_rows - first);
            for (int64_t g = 0; g < n; ++g) {
                const int64_t len = own_len.data()[p * num_rows + first + g];
                own_k[g] = {at(k_own, p, first + g, head), k_own.stride(3), len};
                own_v[g] = {at(v_own, p, first + g, head), v_own.stride(3), len};
            }
            const int64_t len = prompt_len.data()[p];
            DecodeTask task;
            task.num_rows = n, task.repeats = repeats, task.dim = dim, task.scale = scale;
            task.q = at(q, p, first, head * repeats);
            task.q_row_stride = q.stride(1), task.q_head_stride = q.stride(2);
            task.out = const_cast<void*>(at(out, p, first, head * repeats));
            task.out_row_stride = out.stride(1), task.out_head_stride = out.stride(2);
            task.prompt_k = {at(k_prompt, p, head), k_prompt.stride(2), len};
            task.prompt_v = {at(v_prompt, p, head), v_prompt.stride(2), len};
            task.own_k = own_k.data(), task.own_v = own_v.data();
            task.scratch = scratch.get();
            decode(task);
        }
    }
}

}  // namespace

void bind_decode(nb::module_& module) {
    module.def("decode_attention", &decode_attention, nb::arg("q").noconvert(), nb::arg("k_prompt").noconvert(),
               nb::arg("v_prompt").noconvert(), nb::arg("prompt_len").noconvert(), nb::arg("k_own").noconvert(),
               nb::arg("v_own").noconvert(), nb::arg("own_len").noconvert(), nb::arg("scale"),
               nb::arg("out").noconvert());
}

}  // namespace isomorph
