// The only place that knows OpenMP.
#pragma once

#include <cstdint>

namespace cna {

// Run task(context, i, thread) for i in 0 .. n - 1 on up to n_threads threads; `thread` is below n_threads. Which
// thread takes which i is not fixed: no result may depend on it. All threads compute in the caller's
// floating-point mode.
void run_tasks(int64_t n, int n_threads, void (*task)(const void *context, int64_t i, int thread), const void *context);

// The number of threads that serve a call that asks for n. There is a most, because each thread has scratch memory, and
// OpenMP ends the process when the system refuses a thread.
int usable_threads(int n);

bool has_openmp();

template <class Task>
void parallel_for(int64_t n, int n_threads, const Task &task) {
  run_tasks(
      n, n_threads,
      [](const void *context, int64_t i, int thread) { (*static_cast<const Task *>(context))(i, thread); }, &task);
}

}  // namespace cna
