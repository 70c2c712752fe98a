/* A CUDA driver without a device: every call succeeds and does nothing, and launches are counted. With it the host's
   half of a launch runs and can be timed on any machine; see host_triton.py.

   cc -O2 -shared -fPIC -Wl,-soname,libcuda.so.1 -o libcuda.so.1 stub_cuda.c */

#include <stddef.h>
#include <stdint.h>

static uint64_t n_launches = 0;
uint64_t stub_launches(void) { return n_launches; }

/* One device, one context, one module with one function: numbers that nobody looks behind. */
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)16, 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)16, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleLoadData(void **module, const void *image) { return *module = (void *)32, 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = (void *)48, 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = attribute == 0 ? 1024 : 32, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { return *text = "stub", 0; }
int cuStreamIsCapturing(void *stream, int *capturing) { return *capturing = 0, 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { return *clusters = 132, 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }

/* A Hopper: compute capability 9.0, 132 multiprocessors, 227 KB of shared memory a program, 65,536 registers. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 75: return *value = 9, 0;
    case 76: return *value = 0, 0;
    case 16: return *value = 132, 0;
    case 97: return *value = 232448, 0;
    case 12: return *value = 65536, 0;
  }
  return *value = 1, 0;
}

/* Host memory stands in for the device's, so an address is its own. */
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { return *(uint64_t *)value = pointer, 0; }
int cuPointerGetAttributes(unsigned n, int *attributes, void **values, uint64_t pointer) { return 0; }

int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { return n_launches++, 0; }
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void *stream, void **arguments, void **extra) {
  return n_launches++, 0;
}
