#include "workspace.h"

#include <cstdlib>

namespace cna {

namespace {
constexpr size_t LITTLE = 1 << 20;  // bytes that a thread may keep for ever
constexpr int PATIENCE = 4096;  // small calls in a row, some ten tokens of a model, until a large buffer is given back

struct Buffer {
  void *at = nullptr;
  size_t bytes = 0;
  int small_calls = 0;  // since the last call that needed a quarter of the buffer
  ~Buffer() { std::free(at); }
};
thread_local Buffer buffer;
}  // namespace

char *workspace(size_t bytes) {
  const bool small = buffer.bytes > LITTLE && bytes < buffer.bytes / 4;
  buffer.small_calls = small ? buffer.small_calls + 1 : 0;
  if (bytes > buffer.bytes || buffer.small_calls > PATIENCE) {
    std::free(buffer.at);
    buffer.at = nullptr;
    buffer.bytes = 0;
    buffer.small_calls = 0;
    if (posix_memalign(&buffer.at, 64, bytes) != 0) return nullptr;
    buffer.bytes = bytes;
  }
  return static_cast<char *>(buffer.at);
}

}  // namespace cna
