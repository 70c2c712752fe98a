// The C functions: every argument is checked before anything is written, then the level in use does the work.
#include "isa.h"
#include "threads.h"

namespace cna {
namespace {

constexpr int64_t LARGEST = int64_t(1) << 47;  // bytes: no array is larger than an address space

struct Array {
  const void *at;
  int64_t rows, columns, stride, element;
  bool written;

  bool empty() const { return rows == 0 || columns == 0; }
  // Bytes from the first element to behind the last.
  int64_t extent() const { return ((rows - 1) * stride + columns) * element; }
};

int check_array(const Array &a) {
  if (a.rows < 0 || a.columns < 0 || a.rows > LARGEST || a.columns > LARGEST) return CNA_ERR_SIZE;
  if (a.empty()) return CNA_OK;
  if (!a.at) return CNA_ERR_NULL;
  if (reinterpret_cast<uintptr_t>(a.at) % a.element) return CNA_ERR_ALIGN;
  if (a.rows > 1) {
    if (a.stride < a.columns) return CNA_ERR_STRIDE;
    if (a.stride > LARGEST || a.rows > LARGEST / a.stride) return CNA_ERR_SIZE;  // so that extent() fits 64 bits
  }
  if (a.extent() > LARGEST) return CNA_ERR_SIZE;
  if (reinterpret_cast<uintptr_t>(a.at) > UINTPTR_MAX - uintptr_t(a.extent())) return CNA_ERR_SIZE;
  return CNA_OK;
}

// Do two arrays share an element? Exact for equal strides (halves of one wider array do not overlap) and for single
// rows; otherwise an array between the rows of another counts as overlapping.
bool overlap(const Array &a, const Array &b) {
  if (a.empty() || b.empty()) return false;
  const Array &low = a.at <= b.at ? a : b, &high = a.at <= b.at ? b : a;
  const int64_t distance = static_cast<const char *>(high.at) - static_cast<const char *>(low.at);
  if (distance >= low.extent()) return false;
  const int64_t row = low.stride * low.element;
  if (low.rows < 2 || (high.rows > 1 && row != high.stride * high.element)) return true;
  const int64_t column = distance % row;
  return column < low.columns * low.element || column + high.columns * high.element > row;
}

int check_circuits(const cna_extras &e, int64_t n_tokens, int64_t N) {
  const int64_t edges = (N + 1023) / 1024 + 1;
  int64_t last = -1;
  for (int64_t t = 0; t < n_tokens; t++) {
    const int64_t circuit = e.row_circuit[t];
    if (circuit < 0 || circuit >= e.n_circuits || circuit == last) continue;
    last = circuit;
    const int32_t *offsets = e.offsets + circuit * e.offsets_stride;
    if (offsets[0] < 0 || offsets[edges - 1] > e.n_entries) return CNA_ERR_SCALE;
    for (int64_t b = 0; b + 1 < edges; b++) {
      if (offsets[b] > offsets[b + 1]) return CNA_ERR_SCALE;
      if (offsets[b + 1] > e.n_entries) return CNA_ERR_SCALE;
      int64_t least = b * 1024;
      const int64_t end = least + 1024 < N ? least + 1024 : N;
      for (int64_t entry = offsets[b]; entry < offsets[b + 1]; entry++) {
        if (e.index[entry] < least || e.index[entry] >= end) return CNA_ERR_SCALE;
        least = int64_t(e.index[entry]) + 1;
      }
    }
  }
  return CNA_OK;
}

// All arrays of a call, the outputs first.
struct Call {
  Array arrays[14];
  int n = 0;
  int status = CNA_OK;

  // Add an array with elements of type T. The stride of an array without a second row, or without columns, may be
  // anything: it becomes the row's length, so that t * stride never overflows.
  template <class T>
  void add(const T *at, int64_t rows, int64_t columns, int64_t &stride, bool written = false) {
    if (rows < 2 || columns == 0) stride = columns;
    const Array array = {at, rows, columns, stride, sizeof(T), written};
    fail(check_array(array));
    arrays[n++] = array;
  }
  template <class T>
  void add_row(const T *at, int64_t columns) {
    int64_t stride = columns;
    add(at, 1, columns, stride);
  }

  // Check the extras and copy to `used` the parts that have any work.
  void add_extras(const cna_extras *extras, cna_extras *used, int64_t n_tokens, int64_t N) {
    *used = cna_extras();
    if (!extras || status != CNA_OK) return;
    if (reinterpret_cast<uintptr_t>(extras) % alignof(cna_extras)) return fail(CNA_ERR_ALIGN);
    if (extras->version != CNA_ABI_VERSION) return fail(CNA_ERR_VERSION);
    cna_extras e = *extras;
    if (e.n_columns < 0 || e.n_circuits < 0 || e.n_entries < 0) return fail(CNA_ERR_SIZE);
    const bool sums = e.act_sum || e.act_sumsq || e.act_sum_fp64 || e.act_sumsq_fp64;
    if (e.token_weight || sums) {
      if (n_tokens && N && e.n_columns && (!e.token_weight || !sums)) return fail(CNA_ERR_NULL);
      add(e.token_weight, n_tokens, e.n_columns, e.token_weight_stride);
      if (e.act_sum) add(e.act_sum, e.n_columns, N, e.act_sum_stride, true);
      if (e.act_sumsq) add(e.act_sumsq, e.n_columns, N, e.act_sumsq_stride, true);
      if (e.act_sum_fp64) add(e.act_sum_fp64, e.n_columns, N, e.act_sum_stride, true);
      if (e.act_sumsq_fp64) add(e.act_sumsq_fp64, e.n_columns, N, e.act_sumsq_stride, true);
    }
    if (e.row_circuit) {
      add_row(e.row_circuit, n_tokens);
      add(e.offsets, e.n_circuits, (N + 1023) / 1024 + 1, e.offsets_stride);
      add_row(e.index, e.n_entries);
      add_row(e.value, e.n_entries);
    } else if (e.offsets || e.index || e.value) {
      if (n_tokens) return fail(CNA_ERR_NULL);
    }
    if (status != CNA_OK) return;
    if (e.row_circuit && e.n_circuits) fail(check_circuits(e, n_tokens, N));
    if (!N || !e.n_columns || !sums) e.token_weight = nullptr;
    if (!N || !e.n_circuits) e.row_circuit = nullptr;
    *used = e;
  }

  void fail(int with) {
    if (status == CNA_OK) status = with;
  }

  // The last checks. Returns the level to use, or nullptr where `status` says what is wrong.
  const Level *ready(int n_threads) {
    if (status == CNA_OK && n_threads < 1) status = CNA_ERR_THREADS;
    for (int i = 0; i < n && status == CNA_OK; i++)
      for (int j = 0; j < n; j++)
        if (i != j && arrays[i].written && overlap(arrays[i], arrays[j])) status = CNA_ERR_OVERLAP;
    const Level *level = current_level();
    if (!level) fail(CNA_ERR_ISA);
    return status == CNA_OK ? level : nullptr;
  }
};

template <class T>
const Ops<T> &ops(const Level &level);
template <>
const Ops<Bf16> &ops(const Level &level) {
  return level.bf16;
}
template <>
const Ops<Fp16> &ops(const Level &level) {
  return level.fp16;
}
template <>
const Ops<float> &ops(const Level &level) {
  return level.fp32;
}

template <class T>
int gated_mlp(T *y, const T *x, const T *w_gate, const T *w_up, const T *w_down, const cna_extras *extras,
              int64_t n_tokens, int64_t H, int64_t N, int64_t y_stride, int64_t x_stride, int64_t w_gate_up_stride,
              int64_t w_down_stride, int n_threads) {
  Call call;
  cna_extras used;
  call.add(y, n_tokens, H, y_stride, true);
  call.add(x, n_tokens, H, x_stride);
  call.add(w_gate, N, H, w_gate_up_stride);
  call.add(w_up, N, H, w_gate_up_stride);
  call.add(w_down, H, N, w_down_stride);
  call.add_extras(extras, &used, n_tokens, N);
  const Level *level = call.ready(n_threads);
  if (!level || !n_tokens || !H) return call.status;  // with H = 0 act is 0 and adds nothing
  return ops<T>(*level).gated_mlp(y, x, w_gate, w_up, w_down, used, n_tokens, H, N, y_stride, x_stride,
                                  w_gate_up_stride, w_down_stride, usable_threads(n_threads));
}

template <class T>
int swiglu(T *act, const T *gate, const T *up, const cna_extras *extras, int64_t n_tokens, int64_t N,
           int64_t act_stride, int64_t gate_stride, int64_t up_stride, int n_threads) {
  Call call;
  cna_extras used;
  call.add(act, n_tokens, N, act_stride, true);
  call.add(gate, n_tokens, N, gate_stride);
  call.add(up, n_tokens, N, up_stride);
  call.add_extras(extras, &used, n_tokens, N);
  const Level *level = call.ready(n_threads);
  if (!level || !n_tokens || !N) return call.status;
  return ops<T>(*level).swiglu(act, gate, up, used, n_tokens, N, act_stride, gate_stride, up_stride,
                               usable_threads(n_threads));
}

template <class T>
int steer_act(T *steered, const T *act, const cna_extras *extras, int64_t n_tokens, int64_t N, int64_t steered_stride,
              int64_t act_stride, int n_threads) {
  Call call;
  cna_extras used;
  call.add(steered, n_tokens, N, steered_stride, true);
  call.add(act, n_tokens, N, act_stride);
  call.add_extras(extras, &used, n_tokens, N);
  const Level *level = call.ready(n_threads);
  if (!level || !n_tokens || !N) return call.status;
  return ops<T>(*level).steer_act(steered, act, used, n_tokens, N, steered_stride, act_stride,
                                  usable_threads(n_threads));
}

template <class T>
int down_proj(T *y, const T *act, const T *w_down, const cna_extras *extras, int64_t n_tokens, int64_t H, int64_t N,
              int64_t y_stride, int64_t act_stride, int64_t w_down_stride, int n_threads) {
  Call call;
  cna_extras used;
  call.add(y, n_tokens, H, y_stride, true);
  call.add(act, n_tokens, N, act_stride);
  call.add(w_down, H, N, w_down_stride);
  call.add_extras(extras, &used, n_tokens, N);
  const Level *level = call.ready(n_threads);
  if (!level || !n_tokens || (!H && !used.token_weight)) return call.status;
  return ops<T>(*level).down_proj(y, act, w_down, used, n_tokens, H, N, y_stride, act_stride, w_down_stride,
                                  usable_threads(n_threads));
}

template <class T>
int linear(T *y, const T *x, const T *w, const T *bias, int64_t n_tokens, int64_t O, int64_t H, int64_t y_stride,
           int64_t x_stride, int64_t w_stride, int n_threads) {
  Call call;
  call.add(y, n_tokens, O, y_stride, true);
  call.add(x, n_tokens, H, x_stride);
  call.add(w, O, H, w_stride);
  if (bias) call.add_row(bias, O);
  const Level *level = call.ready(n_threads);
  if (!level || !n_tokens || !O) return call.status;
  return ops<T>(*level).linear(y, x, w, bias, n_tokens, O, H, y_stride, x_stride, w_stride, usable_threads(n_threads));
}

// Bf16 and Fp16 are structs of one uint16_t: the same bytes.
inline Bf16 *bf16(uint16_t *p) { return reinterpret_cast<Bf16 *>(p); }
inline const Bf16 *bf16(const uint16_t *p) { return reinterpret_cast<const Bf16 *>(p); }
inline Fp16 *fp16(uint16_t *p) { return reinterpret_cast<Fp16 *>(p); }
inline const Fp16 *fp16(const uint16_t *p) { return reinterpret_cast<const Fp16 *>(p); }
inline float *fp32(float *p) { return p; }
inline const float *fp32(const float *p) { return p; }

}  // namespace
}  // namespace cna

using namespace cna;

extern "C" {

int cna_abi_version(void) { return CNA_ABI_VERSION; }

int cna_has_openmp(void) { return has_openmp(); }

const char *cna_status_text(int status) {
  switch (status) {
    case CNA_OK: return "success";
    case CNA_ERR_VERSION: return "extras.version is not this library's CNA_ABI_VERSION";
    case CNA_ERR_NULL: return "a pointer is NULL whose array is not empty";
    case CNA_ERR_SIZE: return "a size is negative, or an array is larger than an address space";
    case CNA_ERR_STRIDE: return "a stride is smaller than its row";
    case CNA_ERR_ALIGN: return "a pointer is not aligned to its element";
    case CNA_ERR_OVERLAP: return "an output shares memory with another array";
    case CNA_ERR_SCALE: return "scale: offsets out of order, or an index outside its block or not ascending";
    case CNA_ERR_THREADS: return "n_threads is below 1";
    case CNA_ERR_ISA: return "the instruction-set level asked for is unknown, or this CPU does not have it";
    case CNA_ERR_MEMORY: return "no memory for the workspace";
    default: return "unknown status";
  }
}

#define CNA_DEFINE(DTYPE, TYPE)                                                                                       \
  int cna_gated_mlp_##DTYPE(TYPE *y, const TYPE *x, const TYPE *w_gate, const TYPE *w_up, const TYPE *w_down,         \
                            const cna_extras *extras, int64_t T, int64_t H, int64_t N, int64_t y_stride,              \
                            int64_t x_stride, int64_t w_gate_up_stride, int64_t w_down_stride, int n_threads) {       \
    return gated_mlp(DTYPE(y), DTYPE(x), DTYPE(w_gate), DTYPE(w_up), DTYPE(w_down), extras, T, H, N, y_stride,        \
                     x_stride, w_gate_up_stride, w_down_stride, n_threads);                                           \
  }                                                                                                                   \
  int cna_swiglu_##DTYPE(TYPE *act, const TYPE *gate, const TYPE *up, const cna_extras *extras, int64_t T, int64_t N, \
                         int64_t act_stride, int64_t gate_stride, int64_t up_stride, int n_threads) {                 \
    return swiglu(DTYPE(act), DTYPE(gate), DTYPE(up), extras, T, N, act_stride, gate_stride, up_stride, n_threads);   \
  }                                                                                                                   \
  int cna_steer_act_##DTYPE(TYPE *steered, const TYPE *act, const cna_extras *extras, int64_t T, int64_t N,           \
                            int64_t steered_stride, int64_t act_stride, int n_threads) {                              \
    return steer_act(DTYPE(steered), DTYPE(act), extras, T, N, steered_stride, act_stride, n_threads);                \
  }                                                                                                                   \
  int cna_down_proj_##DTYPE(TYPE *y, const TYPE *act, const TYPE *w_down, const cna_extras *extras, int64_t T,        \
                            int64_t H, int64_t N, int64_t y_stride, int64_t act_stride, int64_t w_down_stride,        \
                            int n_threads) {                                                                          \
    return down_proj(DTYPE(y), DTYPE(act), DTYPE(w_down), extras, T, H, N, y_stride, act_stride, w_down_stride,       \
                     n_threads);                                                                                      \
  }                                                                                                                   \
  int cna_linear_##DTYPE(TYPE *y, const TYPE *x, const TYPE *w, const TYPE *bias, int64_t T, int64_t O, int64_t H,    \
                         int64_t y_stride, int64_t x_stride, int64_t w_stride, int n_threads) {                       \
    return linear(DTYPE(y), DTYPE(x), DTYPE(w), DTYPE(bias), T, O, H, y_stride, x_stride, w_stride, n_threads);       \
  }

CNA_DEFINE(bf16, uint16_t)
CNA_DEFINE(fp16, uint16_t)
CNA_DEFINE(fp32, float)
}
