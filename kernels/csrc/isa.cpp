// Selects the instruction set of the *_body.cpp files at run time: the best that the processor supports, the one that
// ISOMORPH_ISA names, or one that a test forces; and maps DLPack types to Storage.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "native.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

std::string forced;  // by use_isa; empty: none

std::vector<std::string> isas() {
    std::vector<std::string> found;
#if defined(ISOMORPH_HAS_AVX2)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        found.push_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back("avx2");
#endif
    found.push_back("baseline");
    return found;
}

void use_isa(const std::string& isa) {
    const std::vector<std::string> here = isas();
    if (!isa.empty() && std::find(here.begin(), here.end(), isa) == here.end())
        throw nb::value_error(("use_isa: this machine does not support " + isa + "; see isas()").c_str());
    forced = isa;
}

std::string unforced() {
    const std::vector<std::string> here = isas();
    const char* wanted = std::getenv("ISOMORPH_ISA");
    if (wanted == nullptr || *wanted == '\0') return here.front();
    if (std::find(here.begin(), here.end(), wanted) != here.end()) return wanted;
    std::string names;
    for (const std::string& name : here) names += (names.empty() ? "" : ", ") + name;
    throw nb::value_error(("ISOMORPH_ISA is " + std::string(wanted) + ", but the C++ module runs here with: " + names).c_str());
}

}  // namespace

const std::string& isa() {
    static const std::string usual = unforced();
    return forced.empty() ? usual : forced;
}

Storage storage_of(const Array& array, const char* op, bool takes_float16) {
    const nb::dlpack::dtype dtype = array.dtype();
    const auto code = static_cast<nb::dlpack::dtype_code>(dtype.code);
    if (dtype == nb::dtype<float>()) return Storage::kFloat32;
    if (dtype == nb::dtype<double>()) return Storage::kFloat64;
    if (dtype.bits == 16 && code == nb::dlpack::dtype_code::Bfloat) return Storage::kBFloat16;
    if (dtype.bits == 16 && code == nb::dlpack::dtype_code::Float && takes_float16) return Storage::kFloat16;
    const std::string types = takes_float16 ? "float32, float64, bfloat16 or float16" : "float32, float64 or bfloat16";
    throw nb::type_error((std::string(op) + " supports " + types).c_str());
}

void bind_isa(nb::module_& module) {
    module.def("isa", &isa);
    module.def("isas", &isas);
    module.def("use_isa", &use_isa, nb::arg("isa"));
}

}  // namespace isomorph
