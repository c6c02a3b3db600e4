// Which instruction set the bodies that are compiled several times run with: the best of the machine, or a forced one;
// and what their arrays hold.
#include <algorithm>
#include <string>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "native.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

std::string forced;  // empty: the best that the machine has

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
        throw nb::value_error(("use_isa: this machine does not run " + isa + "; see isas()").c_str());
    forced = isa;
}

}  // namespace

const std::string& isa() {
    static const std::string best = isas().front();
    return forced.empty() ? best : forced;
}

Storage storage_of(const nb::ndarray<nb::device::cpu>& array, const char* op) {
    const nb::dlpack::dtype dtype = array.dtype();
    if (dtype == nb::dtype<float>()) return Storage::kFloat32;
    if (dtype == nb::dtype<double>()) return Storage::kFloat64;
    if (dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16) return Storage::kBFloat16;
    throw nb::type_error((std::string(op) + ": float32, float64 or bfloat16").c_str());
}

void bind_isa(nb::module_& module) {
    module.def("isas", &isas);
    module.def("use_isa", &use_isa, nb::arg("isa"));
}

}  // namespace isomorph
