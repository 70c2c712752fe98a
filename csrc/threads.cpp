#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <cfenv>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace cna {

// A child of fork() has none of its parent's threads, but OpenMP believes that it has them and would wait for ever.
static std::atomic<bool> forked(false);

static const int hook = pthread_atfork(nullptr, nullptr, [] { forked = true; });

void run_tasks(int64_t n, int n_threads, void (*task)(const void *, int64_t, int), const void *context) {
  (void)hook;
#ifdef _OPENMP
  if (n > 1 && n_threads > 1 && !forked) {
    const int threads = n < n_threads ? int(n) : n_threads;
    std::fenv_t callers;  // the caller's mode, with flushing of denormals where the processor has it
    std::fegetenv(&callers);
#pragma omp parallel num_threads(threads)
    {
      std::fenv_t own;
      std::fegetenv(&own);
      std::fesetenv(&callers);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < n; i++) task(context, i, omp_get_thread_num());
      std::fesetenv(&own);
    }
    return;
  }
#else
  (void)n_threads;
#endif
  for (int64_t i = 0; i < n; i++) task(context, i, 0);
}

int usable_threads(int n) {
#ifdef _OPENMP
  const int most = omp_get_num_procs() < 4 ? 16 : 4 * omp_get_num_procs();
  return n < most ? n : most;
#else
  return n < 1 ? n : 1;
#endif
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace cna
