// The C++ implementations of kernels/ for the CPU. Arrays are passed by DLPack; results are written to arrays that the
// caller allocated. Python checks shapes and ranges before the call; nanobind checks types, devices and contiguity.
#pragma once

#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "storage.h"

namespace isomorph {

template <typename T>
using Array1 = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::device::cpu, nanobind::c_contig>;

using Array = nanobind::ndarray<nanobind::device::cpu>;

// The element type of an array. Raises TypeError, naming ``op``, for other types, and for float16 unless supported.
Storage storage_of(const Array& array, const char* op, bool takes_float16 = false);

inline Heads heads_of(const Array& array) { return {array.data(), array.stride(0), array.stride(1)}; }

// The instruction set in use: "avx512", "avx2" or "baseline".
const std::string& isa();

// OF(avx512), OF(avx2) or OF(baseline): what the *_body.cpp of the instruction set in use has. OF is a macro that takes
// the namespace.
#if defined(ISOMORPH_HAS_AVX2)
#define ISOMORPH_OF_ISA(OF) (isa() == "avx512" ? OF(avx512) : isa() == "avx2" ? OF(avx2) : OF(baseline))
#else
#define ISOMORPH_OF_ISA(OF) OF(baseline)
#endif

void bind_isa(nanobind::module_& module);
void bind_parallel(nanobind::module_& module);
void bind_attention(nanobind::module_& module);
void bind_packing(nanobind::module_& module);
void bind_advantage(nanobind::module_& module);
void bind_decode(nanobind::module_& module);
void bind_gemm(nanobind::module_& module);
void bind_bit_hash(nanobind::module_& module);
void bind_rows(nanobind::module_& module);
void bind_layer(nanobind::module_& module);

}  // namespace isomorph
