// Scratch memory of a call: kept by the calling thread for its next calls, freed when the thread ends. A large buffer
// is given back when all of many calls have needed less than a quarter of it.
#pragma once

#include <cstddef>
#include <cstdint>

// Under AddressSanitizer parts are kept apart, so that a write behind a part is found.
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define CNA_RED_ZONES
#endif

namespace cna {

// At least `bytes` bytes, aligned to 64, uninitialised; nullptr if there is no memory. Valid until the next call.
char *workspace(size_t bytes);

// Hands out parts of a workspace. Take all parts once with at = nullptr to learn the size, then again with the memory.
struct Parts {
  char *at;
  size_t used = 0;
  // Inlined into each level: the linker must not pick one level's copy for another.
  template <class T>
  __attribute__((always_inline)) inline T *take(int64_t n) {
    T *part = at ? reinterpret_cast<T *>(at + used) : nullptr;
    const size_t bytes = (size_t(n) * sizeof(T) + 63) / 64 * 64;
    used += bytes;
#ifdef CNA_RED_ZONES
    if (at) {
      ASAN_UNPOISON_MEMORY_REGION(part, bytes);
      ASAN_POISON_MEMORY_REGION(at + used, 64);
    }
    used += 64;
#endif
    return part;
  }
};

}  // namespace cna
