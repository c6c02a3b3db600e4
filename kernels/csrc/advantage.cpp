// group_advantage and gae. The specification is kernels/advantage.py. Sums are double, in index order.
#include <cmath>
#include <cstdint>

#include "native.h"
#include "parallel.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

enum Baseline : int { kMean = 0, kLeaveOneOut = 1, kNoBaseline = 2 };
enum Scale : int { kStd = 0, kNoScale = 1, kBatch = 2 };

struct Moments {
    double mean;
    double std;  // with n - 1
    bool is_flat;
};

template <typename T>
Moments moments(const T* x, int64_t n) {
    double sum = 0.0;
    bool is_flat = true;
    for (int64_t i = 0; i < n; ++i) {
        sum += x[i];
        is_flat = is_flat && x[i] == x[0];
    }
    const double mean = n > 0 ? sum / n : 0.0;
    double squares = 0.0;
    for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
    return {mean, n > 1 ? std::sqrt(squares / (n - 1)) : 0.0, is_flat};
}

template <typename T>
void one_group(const T* reward, int64_t n, int baseline, int scale, double eps, T* out) {
    const Moments m = moments(reward, n);
    const bool compares = baseline != kNoBaseline || scale == kStd;
    const double mean = baseline == kNoBaseline ? 0.0 : m.mean;
    double factor = baseline == kLeaveOneOut ? static_cast<double>(n) / static_cast<double>(n - 1) : 1.0;
    if (scale == kStd) factor /= m.std + eps;
    for (int64_t i = 0; i < n; ++i) {
        // exactly 0 if all rewards are equal: reward - rounded mean would not be, and 1 / eps amplifies it
        out[i] = compares && m.is_flat ? T{0} : static_cast<T>((reward[i] - mean) * factor);
    }
}

template <typename T>
void group_advantage(Array1<const T> reward, Array1<const int64_t> offset, int baseline, int scale, double eps,
                     Array1<T> out) {
    const nb::gil_scoped_release release;
    for (size_t group = 0; group + 1 < offset.shape(0); ++group) {
        const int64_t start = offset.data()[group];
        const int64_t n = offset.data()[group + 1] - start;
        one_group(reward.data() + start, n, baseline, scale, eps, out.data() + start);
    }
    if (scale != kBatch) return;
    const int64_t n = static_cast<int64_t>(out.shape(0));
    const Moments m = moments(out.data(), n);
    for (int64_t i = 0; i < n; ++i) {
        out.data()[i] = m.is_flat ? T{0} : static_cast<T>((out.data()[i] - m.mean) / (m.std + eps));
    }
}

template <typename T>
void gae(Array1<const T> reward, Array1<const T> value, Array1<const int64_t> offset, double gamma, double lam,
         Array1<T> advantage) {
    const nb::gil_scoped_release release;
    const int64_t num_seqs = static_cast<int64_t>(offset.shape(0)) - 1;
    for_each_task(num_seqs, [&](int64_t seq, int64_t) noexcept {
        double next_advantage = 0.0, next_value = 0.0;
        for (int64_t t = offset.data()[seq + 1] - 1; t >= offset.data()[seq]; --t) {
            const double delta = reward.data()[t] + gamma * next_value - value.data()[t];
            next_advantage = delta + gamma * lam * next_advantage;
            next_value = value.data()[t];
            advantage.data()[t] = static_cast<T>(next_advantage);
        }
    });
}

template <typename T>
void bind(nb::module_& module) {
    module.def("group_advantage", &group_advantage<T>, nb::arg("reward").noconvert(), nb::arg("offset").noconvert(),
               nb::arg("baseline"), nb::arg("scale"), nb::arg("eps"), nb::arg("out").noconvert());
    module.def("gae", &gae<T>, nb::arg("reward").noconvert(), nb::arg("value").noconvert(),
               nb::arg("offset").noconvert(), nb::arg("gamma"), nb::arg("lam"), nb::arg("advantage").noconvert());
}

}  // namespace

void bind_advantage(nb::module_& module) {
    bind<float>(module);
    bind<double>(module);
}

}  // namespace isomorph
