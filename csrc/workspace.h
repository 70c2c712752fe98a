// Scratch memory of a call: kept by the calling thread for its next call, freed when the thread ends.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cna {

// At least `bytes` bytes, aligned to 64, uninitialised; nullptr if there is no memory. Valid until the next call.
char *workspace(size_t bytes);

// Hands out parts of a workspace. Run once with nullptr to learn the size, then again with the memory.
struct Parts {
  char *at;
  size_t used = 0;
  template <class T>
  T *take(int64_t n) {
    T *part = at ? reinterpret_cast<T *>(at + used) : nullptr;
    used += (size_t(n) * sizeof(T) + 63) / 64 * 64;
    return part;
  }
};

}  // namespace cna
