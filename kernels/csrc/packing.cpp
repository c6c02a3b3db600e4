// assign_groups and take_ragged. The specification is kernels/packing.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "native.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

using Costs = std::vector<int64_t>;

// Assigns the groups, in `order`, each to the first bin with enough space; returns the number of bins.
int64_t first_fit(const int64_t* cost, const Costs& order, int64_t max_tok, int64_t* bin) {
    Costs load;
    for (int64_t group : order) {
        size_t b = 0;
        while (b < load.size() && load[b] + cost[group] > max_tok) ++b;
        if (b == load.size()) load.push_back(0);
        load[b] += cost[group];
        bin[group] = static_cast<int64_t>(b);
    }
    return static_cast<int64_t>(load.size());
}

// Assigns the groups, in `order`, each to the least loaded of num_bins; returns false if a bin overflows.
bool least_loaded(const int64_t* cost, const Costs& order, int64_t max_tok, int64_t num_bins, int64_t* bin) {
    Costs load(num_bins, 0);
    for (int64_t group : order) {
        const auto lightest = std::min_element(load.begin(), load.end());
        *lightest += cost[group];
        if (*lightest > max_tok) return false;
        bin[group] = lightest - load.begin();
    }
    return true;
}

void assign_groups(Array1<const int64_t> cost_array, int64_t max_tok, Array1<int64_t> bin_array) {
    const nb::gil_scoped_release release;
    const int64_t* cost = cost_array.data();
    int64_t* bin = bin_array.data();
    const int64_t num_groups = static_cast<int64_t>(cost_array.shape(0));
    Costs order(num_groups);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [cost](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    const int64_t total = std::accumulate(cost, cost + num_groups, int64_t{0});
    Costs fitted(num_groups);
    const int64_t num_fitted = first_fit(cost, order, max_tok, fitted.data());
    for (int64_t num_bins = std::max<int64_t>(1, (total + max_tok - 1) / max_tok); num_bins <= num_fitted; ++num_bins) {
        if (least_loaded(cost, order, max_tok, num_bins, bin)) return;
    }
    std::copy(fitted.begin(), fitted.end(), bin);
}

void take_ragged(Array1<const uint8_t> value_array, Array1<const int64_t> offset_array, int64_t item_bytes,
                 Array1<const int64_t> segment_array, Array1<uint8_t> out_array) {
    const nb::gil_scoped_release release;
    const uint8_t* value = value_array.data();
    const int64_t* offset = offset_array.data();
    uint8_t* out = out_array.data();
    for (size_t i = 0; i < segment_array.shape(0); ++i) {
        const int64_t segment = segment_array.data()[i];
        const size_t num_bytes = static_cast<size_t>((offset[segment + 1] - offset[segment]) * item_bytes);
        if (num_bytes > 0) std::memcpy(out, value + offset[segment] * item_bytes, num_bytes);
        out += num_bytes;
    }
}

}  // namespace

void bind_packing(nb::module_& module) {
    module.def("assign_groups", &assign_groups, nb::arg("cost").noconvert(), nb::arg("max_tok"),
               nb::arg("bin").noconvert());
    module.def("take_ragged", &take_ragged, nb::arg("value").noconvert(), nb::arg("offset").noconvert(),
               nb::arg("item_bytes"), nb::arg("segment").noconvert(), nb::arg("out").noconvert());
}

}  // namespace isomorph
