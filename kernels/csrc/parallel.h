// Parallel loops; no other file starts threads. Tasks of one loop run in any order and concurrently. So a task must not
// read what another task of its loop writes, and no sum may run across tasks: then bits depend neither on the order nor
// on the number of threads. tests/kernels/test_threads.py runs every op in several orders and with several numbers of
// threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(ISOMORPH_STD_THREADS)  // for the thread sanitizer, which does not know how OpenMP runtimes synchronise
#include <thread>
#else
#include <omp.h>
#endif

namespace isomorph {

// Number of threads for loops that the calling thread starts.
int num_threads();

// For tests: whether tasks run one after the other, and in which order.
bool is_serial();
std::vector<int64_t> serial_order(int64_t num_tasks);

namespace detail {

// Runs the tasks of one loop on threads. Dynamic schedule of kChunk tasks at a time; 0: static schedule.
template <int kChunk, typename Run>
void on_threads(int64_t num_tasks, const Run& run) {
#if defined(ISOMORPH_STD_THREADS)
    const int64_t num_workers = num_threads();
    std::vector<std::thread> team;
    for (int64_t worker = 0; worker < num_workers; ++worker) {
        team.emplace_back([&run, num_tasks, num_workers, worker] {  // neighbours run on different threads
            for (int64_t task = worker; task < num_tasks; task += num_workers) run(task, worker);
        });
    }
    for (std::thread& thread : team) thread.join();
#else
#pragma omp parallel num_threads(num_threads())
    {
        const int64_t worker = omp_get_thread_num();
        if constexpr (kChunk == 0) {
#pragma omp for schedule(static) nowait
            for (int64_t task = 0; task < num_tasks; ++task) run(task, worker);
        } else {
#pragma omp for schedule(dynamic, kChunk) nowait
            for (int64_t task = 0; task < num_tasks; ++task) run(task, worker);
        }
    }
#endif
}

}  // namespace detail

// Calls run(task, worker) once for each task in [0, num_tasks), and returns when all are done. Two tasks with the same
// worker, in [0, num_threads()), do not run concurrently. Tasks must not throw: allocate before the loop.
template <int kChunk = 0, typename Run>
void for_each_task(int64_t num_tasks, const Run& run) {
    static_assert(std::is_nothrow_invocable_v<const Run&, int64_t, int64_t>, "declare the task noexcept");
    if (is_serial()) {
        for (const int64_t task : serial_order(num_tasks)) run(task, task % num_threads());
    } else if (num_tasks <= 1 || num_threads() == 1) {
        for (int64_t task = 0; task < num_tasks; ++task) run(task, 0);
    } else {
        detail::on_threads<kChunk>(num_tasks, run);
    }
}

// Uninitialised memory in pieces aligned to cache lines, by default one per worker. Throws std::bad_alloc, in Python a
// MemoryError.
class Scratch {
  public:
    explicit Scratch(int64_t piece_bytes, int64_t num_pieces = num_threads())
        : stride_((piece_bytes + kLine - 1) / kLine * kLine),
          data_(static_cast<char*>(std::aligned_alloc(kLine, static_cast<size_t>(stride_ * num_pieces))), &std::free) {
        if (!data_ && stride_ * num_pieces > 0) throw std::bad_alloc();
    }
    void* piece(int64_t i) const { return data_.get() + i * stride_; }

  private:
    static constexpr int64_t kLine = 64;
    int64_t stride_;
    std::unique_ptr<char, void (*)(void*)> data_;
};

}  // namespace isomorph
