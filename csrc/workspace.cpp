#include "workspace.h"

#include <cstdlib>

namespace cna {

namespace {
struct Buffer {
  void *at = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(at); }
};
thread_local Buffer buffer;
}  // namespace

char *workspace(size_t bytes) {
  if (bytes > buffer.bytes) {
    std::free(buffer.at);
    buffer.at = nullptr;
    buffer.bytes = 0;
    if (posix_memalign(&buffer.at, 64, bytes) != 0) return nullptr;
    buffer.bytes = bytes;
  }
  return static_cast<char *>(buffer.at);
}

}  // namespace cna
