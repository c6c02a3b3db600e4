// Bodies of kernels/ that run on the CPU. Arrays arrive through DLPack, results go into arrays the caller made.
// Shapes and ranges are checked in Python, before the call; types, devices and contiguity by nanobind.
#pragma once

#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "storage.h"

namespace isomorph {

template <typename T>
using Array1 = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::device::cpu, nanobind::c_contig>;

using Array = nanobind::ndarray<nanobind::device::cpu>;

// Raises TypeError, in the name of ``op``, for every other type, and for float16 unless the op takes it.
Storage storage_of(const Array& array, const char* op, bool takes_float16 = false);

inline Heads heads_of(const Array& array) { return {array.data(), array.stride(0), array.stride(1)}; }

// "avx512", "avx2" or "baseline".
const std::string& isa();

void bind_isa(nanobind::module_& module);
void bind_parallel(nanobind::module_& module);
void bind_attention(nanobind::module_& module);
void bind_packing(nanobind::module_& module);
void bind_advantage(nanobind::module_& module);
void bind_decode(nanobind::module_& module);
void bind_gemm(nanobind::module_& module);
void bind_bit_hash(nanobind::module_& module);
void bind_rows(nanobind::module_& module);

}  // namespace isomorph
