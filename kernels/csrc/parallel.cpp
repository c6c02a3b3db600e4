// The number of threads of parallel loops; for tests, the order of tasks without threads.
#include "parallel.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>

#include <nanobind/stl/string.h>

#include "native.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

thread_local int requested = 0;  // set by use_threads; 0: not set
std::string order;           // set by use_order; empty: on threads

// torch.set_num_threads sets PyTorch's OpenMP runtime only, and this module may be linked to another one.
void use_threads(int count) {
    if (count < 1) throw nb::value_error("use_threads: count must be >= 1");
    requested = count;
}

void use_order(const std::string& name) {
    if (!name.empty() && name != "forward" && name != "reverse" && name != "shuffled")
        throw nb::value_error(("use_order takes forward, reverse, shuffled, or an empty order; got " + name).c_str());
    order = name;
}

// The number of different system threads that run a loop of num_threads() tasks.
int64_t team_size() {
    const nb::gil_scoped_release release;
    std::vector<std::thread::id> ids(num_threads());
    for_each_task(num_threads(), [&](int64_t task, int64_t) noexcept { ids[task] = std::this_thread::get_id(); });
    return static_cast<int64_t>(std::set<std::thread::id>(ids.begin(), ids.end()).size());
}

}  // namespace

int num_threads() {
#if defined(ISOMORPH_STD_THREADS)
    return requested > 0 ? requested : 1;
#else
    return requested > 0 ? requested : omp_get_max_threads();
#endif
}

bool is_serial() { return !order.empty(); }

std::vector<int64_t> serial_order(int64_t num_tasks) {
    std::vector<int64_t> tasks(num_tasks);
    std::iota(tasks.begin(), tasks.end(), 0);
    if (order == "reverse") std::reverse(tasks.begin(), tasks.end());
    if (order == "shuffled") std::shuffle(tasks.begin(), tasks.end(), std::mt19937_64(num_tasks));
    return tasks;
}

void bind_parallel(nb::module_& module) {
    module.def("use_threads", &use_threads, nb::arg("count"));
    module.def("use_order", &use_order, nb::arg("order"));
    module.def("team_size", &team_size);
}

}  // namespace isomorph
