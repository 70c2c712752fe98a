// The C functions: every argument is checked before anything is written, then the level in use does the work.
#include <vector>

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
  Array arrays[40];  // a layer of cna_decode has up to 34
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

  // Add rows [n_rows, K] of weights in elements of T; `stride` counts elements.
  template <class T>
  Weights add_weights(const T *at, int64_t n_rows, int64_t K, int64_t stride) {
    add(at, n_rows, K, stride);
    return {at, status == CNA_OK ? stride * int64_t(sizeof(T)) : 0, type_of(T())};
  }

  // Add rows of weights in elements of T, or in blocks.
  template <class T>
  Weights add_weights(const cna_weight *w, int64_t n_rows, int64_t K, T = T()) {
    if (!w || reinterpret_cast<uintptr_t>(w) % alignof(cna_weight)) {
      fail(w ? CNA_ERR_ALIGN : CNA_ERR_NULL);
      return {};
    }
    if (w->type == type_of(T())) {
      if (w->row_bytes % int64_t(sizeof(T))) fail(CNA_ERR_ALIGN);
      return add_weights(static_cast<const T *>(w->at), n_rows, K, w->row_bytes / int64_t(sizeof(T)));
    }
    const BlockSize size = block_size(w->type);
    if (!size.elements) fail(CNA_ERR_TYPE);
    if (size.elements && K % size.elements) fail(CNA_ERR_BLOCK);
    int64_t row_bytes = w->row_bytes;
    add(static_cast<const uint8_t *>(w->at), n_rows,
        size.elements && K >= 0 && K <= LARGEST ? K / size.elements * size.bytes : K, row_bytes);
    return {w->at, row_bytes, int(w->type)};
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

// Whose weights a call has: an array with a stride, or a cna_weight.
template <class T>
struct Strided {
  const T *at;
  int64_t stride;
};
template <class T>
Weights add_weights(Call &call, Strided<T> w, int64_t n_rows, int64_t K) {
  return call.add_weights(w.at, n_rows, K, w.stride);
}
template <class T>
Weights add_weights(Call &call, const cna_weight *w, int64_t n_rows, int64_t K) {
  return call.add_weights<T>(w, n_rows, K);
}

template <class T, class W>
int gated_mlp(T *y, const T *x, W w_gate, W w_up, W w_down, const cna_extras *extras, int64_t n_tokens, int64_t H,
              int64_t N, int64_t y_stride, int64_t x_stride, int n_threads) {
  Call call;
  cna_extras used;
  call.add(y, n_tokens, H, y_stride, true);
  call.add(x, n_tokens, H, x_stride);
  const Weights gate = add_weights<T>(call, w_gate, N, H), up = add_weights<T>(call, w_up, N, H);
  const Weights down = add_weights<T>(call, w_down, H, N);
  call.add_extras(extras, &used, n_tokens, N);
  const Level *level = call.ready(n_threads);
  if (!level || !n_tokens || !H) return call.status;  // with H = 0 act is 0 and adds nothing
  return ops<T>(*level).gated_mlp(y, x, gate, up, down, used, n_tokens, H, N, y_stride, x_stride,
                                  usable_threads(n_threads));
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
  if (steered != act || (steered_stride != act_stride && n_tokens > 1)) call.add(act, n_tokens, N, act_stride);
  call.add_extras(extras, &used, n_tokens, N);
  const Level *level = call.ready(n_threads);
  if (!level || !n_tokens || !N) return call.status;
  return ops<T>(*level).steer_act(steered, act, used, n_tokens, N, steered_stride, act_stride,
                                  usable_threads(n_threads));
}

template <class T, class W>
int down_proj(T *y, const T *act, W w_down, const cna_extras *extras, int64_t n_tokens, int64_t H, int64_t N,
              int64_t y_stride, int64_t act_stride, int n_threads) {
  Call call;
  cna_extras used;
  call.add(y, n_tokens, H, y_stride, true);
  call.add(act, n_tokens, N, act_stride);
  const Weights down = add_weights<T>(call, w_down, H, N);
  call.add_extras(extras, &used, n_tokens, N);
  const Level *level = call.ready(n_threads);
  if (!level || !n_tokens || (!H && !used.token_weight)) return call.status;
  return ops<T>(*level).down_proj(y, act, down, used, n_tokens, H, N, y_stride, act_stride, usable_threads(n_threads));
}

template <class T, class W>
int linear(T *y, const T *x, W w, const T *bias, int64_t n_tokens, int64_t O, int64_t H, int64_t y_stride,
           int64_t x_stride, int n_threads) {
  Call call;
  call.add(y, n_tokens, O, y_stride, true);
  call.add(x, n_tokens, H, x_stride);
  const Weights weights = add_weights<T>(call, w, O, H);
  if (bias) call.add_row(bias, O);
  const Level *level = call.ready(n_threads);
  if (!level || !n_tokens || !O) return call.status;
  return ops<T>(*level).linear(y, x, weights, bias, n_tokens, O, H, y_stride, x_stride, usable_threads(n_threads));
}

template <class T>
int dequantize(T *out, const cna_weight *w, int64_t O, int64_t H, int64_t out_stride, int n_threads) {
  Call call;
  call.add(out, O, H, out_stride, true);
  const Weights weights = call.add_weights<T>(w, O, H);
  if (weights.type == type_of(T())) call.fail(CNA_ERR_TYPE);
  const Level *level = call.ready(n_threads);
  if (!level || !O || !H) return call.status;
  return ops<T>(*level).dequantize(out, weights, O, H, out_stride, usable_threads(n_threads));
}

// The arguments of a layer. `given`: those that all layers share.
template <class T>
int check_layer(Layer &out, const cna_layer &layer, const cna_decoder &d, const Call &given, const cna_extras *extras,
                cna_extras *used, int64_t n_tokens) {
  Call call = given;
  const int64_t n_q = d.n_heads * d.D, n_k = d.n_kv_heads * d.D;
  const auto row = [&](const void *at, int64_t n, bool may_miss) {
    if (at || !may_miss) call.add_row(static_cast<const T *>(at), n);
    return at;
  };
  out.input_norm = row(layer.input_norm, d.H, false);
  out.post_norm = row(layer.post_norm, d.H, false);
  out.q_norm = row(layer.q_norm, d.D, true);
  out.k_norm = row(layer.k_norm, d.D, true);
  out.w_q = call.add_weights<T>(&layer.w_q, n_q, d.H);
  out.w_k = call.add_weights<T>(&layer.w_k, n_k, d.H);
  out.w_v = call.add_weights<T>(&layer.w_v, n_k, d.H);
  out.w_o = call.add_weights<T>(&layer.w_o, d.H, n_q);
  out.w_gate = call.add_weights<T>(&layer.w_gate, d.N, d.H);
  out.w_up = call.add_weights<T>(&layer.w_up, d.N, d.H);
  out.w_down = call.add_weights<T>(&layer.w_down, d.H, d.N);
  out.b_q = row(layer.b_q, n_q, true);
  out.b_k = row(layer.b_k, n_k, true);
  out.b_v = row(layer.b_v, n_k, true);
  out.b_o = row(layer.b_o, d.H, true);
  // a cache is [T, n_kv_heads, length, D]: rows of heads, from the first to behind the last
  const int64_t heads = (d.n_kv_heads - 1) * d.cache_head + d.length * d.D;
  if (d.cache_head < d.length * d.D && d.n_kv_heads > 1) call.fail(CNA_ERR_STRIDE);
  int64_t stride = d.cache_row;
  call.add(static_cast<const T *>(layer.keys), n_tokens, heads, stride, true);
  call.add(static_cast<const T *>(layer.values), n_tokens, heads, stride, true);
  out.keys = layer.keys;
  out.values = layer.values;
  if (layer.window < 0) call.fail(CNA_ERR_SIZE);
  out.window = layer.window;
  call.add_extras(extras, used, n_tokens, d.N);
  call.ready(1);
  return call.status;
}

template <class T>
int decode(T *hidden, const T *x, const cna_decoder *decoder, const int64_t *position, const T *cos, const T *sin,
           const cna_extras *extras, int64_t n_tokens, int64_t hidden_stride, int64_t x_stride, int64_t rotation_stride,
           int n_threads) {
  Call call;
  if (!decoder) return CNA_ERR_NULL;
  if (reinterpret_cast<uintptr_t>(decoder) % alignof(cna_decoder)) return CNA_ERR_ALIGN;
  if (decoder->version != CNA_ABI_VERSION) return CNA_ERR_VERSION;
  const cna_decoder &d = *decoder;
  constexpr int64_t MOST = int64_t(1) << 31;  // so that products of two sizes are below LARGEST's square
  for (int64_t size : {n_tokens, d.n_layers, d.H, d.N, d.n_heads, d.n_kv_heads, d.D, d.length})
    if (size < 0 || size > MOST) return CNA_ERR_SIZE;
  if (d.n_kv_heads < 1 || d.n_heads % d.n_kv_heads || d.D % 2 || d.D < 2 || d.length < 1) return CNA_ERR_SIZE;
  if (d.n_heads > LARGEST / d.D || d.length > LARGEST / d.D || d.cache_head < 0 ||
      d.cache_head > LARGEST / d.n_kv_heads)
    return CNA_ERR_SIZE;
  call.add(hidden, n_tokens, d.H, hidden_stride, true);
  call.add(x, n_tokens, d.H, x_stride);
  int64_t sine_stride = rotation_stride;
  call.add(cos, n_tokens, d.D, rotation_stride);
  call.add(sin, n_tokens, d.D, sine_stride);
  call.add_row(position, n_tokens);
  call.add_row(static_cast<const T *>(d.norm), d.H);
  if (d.n_layers && (!d.layers || reinterpret_cast<uintptr_t>(d.layers) % alignof(cna_layer)))
    call.fail(d.layers ? CNA_ERR_ALIGN : CNA_ERR_NULL);
  if (extras && reinterpret_cast<uintptr_t>(extras) % alignof(cna_extras)) call.fail(CNA_ERR_ALIGN);
  const Level *level = call.ready(n_threads);
  if (!level) return call.status;
  for (int64_t t = 0; t < n_tokens; t++)
    if (position[t] < 0 || position[t] >= d.length) return CNA_ERR_SIZE;
  std::vector<Layer> layers(d.n_layers);
  std::vector<cna_extras> used(extras ? d.n_layers : 0);
  std::vector<const Weights *> stream, heads, act;
  cna_extras none;
  for (int64_t i = 0; i < d.n_layers; i++) {
    const int status = check_layer<T>(layers[i], d.layers[i], d, call, extras ? extras + i : nullptr,
                                      extras ? &used[i] : &none, n_tokens);
    if (status != CNA_OK) return status;
    const Layer &layer = layers[i];
    for (const Weights *w : {&layer.w_q, &layer.w_k, &layer.w_v, &layer.w_gate, &layer.w_up}) stream.push_back(w);
    heads.push_back(&layer.w_o);
    act.push_back(&layer.w_down);
  }
  if (!n_tokens || !d.H) return CNA_OK;
  const auto list = [](const std::vector<const Weights *> &all) { return WeightList{all.data(), int64_t(all.size())}; };
  const Decoder checked = {layers.data(), d.norm,       d.n_layers,   d.H,         d.N,
                           d.n_heads,     d.n_kv_heads, d.D,          d.length,    d.cache_row,
                           d.cache_head,  d.eps,        list(stream), list(heads), list(act)};
  return ops<T>(*level).decode(hidden, x, checked, position, cos, sin, extras ? used.data() : nullptr, n_tokens,
                               hidden_stride, x_stride, rotation_stride, usable_threads(n_threads));
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
    case CNA_ERR_TYPE: return "a weight's type is neither a block format nor that of the function";
    case CNA_ERR_BLOCK: return "the rows of a weight are not whole blocks";
    default: return "unknown status";
  }
}

#define CNA_DEFINE(DTYPE, TYPE, ELEMENT)                                                                               \
  int cna_gated_mlp_##DTYPE(TYPE *y, const TYPE *x, const TYPE *w_gate, const TYPE *w_up, const TYPE *w_down,          \
                            const cna_extras *extras, int64_t T, int64_t H, int64_t N, int64_t y_stride,               \
                            int64_t x_stride, int64_t w_gate_up_stride, int64_t w_down_stride, int n_threads) {        \
    const Strided<ELEMENT> gate = {DTYPE(w_gate), w_gate_up_stride}, up = {DTYPE(w_up), w_gate_up_stride},             \
                           down = {DTYPE(w_down), w_down_stride};                                                      \
    return gated_mlp(DTYPE(y), DTYPE(x), gate, up, down, extras, T, H, N, y_stride, x_stride, n_threads);              \
  }                                                                                                                    \
  int cna_swiglu_##DTYPE(TYPE *act, const TYPE *gate, const TYPE *up, const cna_extras *extras, int64_t T, int64_t N,  \
                         int64_t act_stride, int64_t gate_stride, int64_t up_stride, int n_threads) {                  \
    return swiglu(DTYPE(act), DTYPE(gate), DTYPE(up), extras, T, N, act_stride, gate_stride, up_stride, n_threads);    \
  }                                                                                                                    \
  int cna_steer_act_##DTYPE(TYPE *steered, const TYPE *act, const cna_extras *extras, int64_t T, int64_t N,            \
                            int64_t steered_stride, int64_t act_stride, int n_threads) {                               \
    return steer_act(DTYPE(steered), DTYPE(act), extras, T, N, steered_stride, act_stride, n_threads);                 \
  }                                                                                                                    \
  int cna_down_proj_##DTYPE(TYPE *y, const TYPE *act, const TYPE *w_down, const cna_extras *extras, int64_t T,         \
                            int64_t H, int64_t N, int64_t y_stride, int64_t act_stride, int64_t w_down_stride,         \
                            int n_threads) {                                                                           \
    const Strided<ELEMENT> down = {DTYPE(w_down), w_down_stride};                                                      \
    return down_proj(DTYPE(y), DTYPE(act), down, extras, T, H, N, y_stride, act_stride, n_threads);                    \
  }                                                                                                                    \
  int cna_linear_##DTYPE(TYPE *y, const TYPE *x, const TYPE *w, const TYPE *bias, int64_t T, int64_t O, int64_t H,     \
                         int64_t y_stride, int64_t x_stride, int64_t w_stride, int n_threads) {                        \
    return linear(DTYPE(y), DTYPE(x), Strided<ELEMENT>{DTYPE(w), w_stride}, DTYPE(bias), T, O, H, y_stride, x_stride,  \
                  n_threads);                                                                                          \
  }                                                                                                                    \
  int cna_gated_mlp_typed_##DTYPE(TYPE *y, const TYPE *x, const cna_weight *w_gate, const cna_weight *w_up,            \
                                  const cna_weight *w_down, const cna_extras *extras, int64_t T, int64_t H, int64_t N, \
                                  int64_t y_stride, int64_t x_stride, int n_threads) {                                 \
    return gated_mlp(DTYPE(y), DTYPE(x), w_gate, w_up, w_down, extras, T, H, N, y_stride, x_stride, n_threads);        \
  }                                                                                                                    \
  int cna_down_proj_typed_##DTYPE(TYPE *y, const TYPE *act, const cna_weight *w_down, const cna_extras *extras,        \
                                  int64_t T, int64_t H, int64_t N, int64_t y_stride, int64_t act_stride,               \
                                  int n_threads) {                                                                     \
    return down_proj(DTYPE(y), DTYPE(act), w_down, extras, T, H, N, y_stride, act_stride, n_threads);                  \
  }                                                                                                                    \
  int cna_linear_typed_##DTYPE(TYPE *y, const TYPE *x, const cna_weight *w, const TYPE *bias, int64_t T, int64_t O,    \
                               int64_t H, int64_t y_stride, int64_t x_stride, int n_threads) {                         \
    return linear(DTYPE(y), DTYPE(x), w, DTYPE(bias), T, O, H, y_stride, x_stride, n_threads);                         \
  }                                                                                                                    \
  int cna_decode_##DTYPE(TYPE *hidden, const TYPE *x, const cna_decoder *decoder, const int64_t *position,             \
                         const TYPE *cos, const TYPE *sin, const cna_extras *extras, int64_t T, int64_t hidden_stride, \
                         int64_t x_stride, int64_t rotation_stride, int n_threads) {                                   \
    return decode(DTYPE(hidden), DTYPE(x), decoder, position, DTYPE(cos), DTYPE(sin), extras, T, hidden_stride,        \
                  x_stride, rotation_stride, n_threads);                                                               \
  }                                                                                                                    \
  int cna_dequantize_##DTYPE(TYPE *out, const cna_weight *w, int64_t O, int64_t H, int64_t out_stride,                 \
                             int n_threads) {                                                                          \
    return dequantize(DTYPE(out), w, O, H, out_stride, n_threads);                                                     \
  }

CNA_DEFINE(bf16, uint16_t, Bf16)
CNA_DEFINE(fp16, uint16_t, Fp16)
CNA_DEFINE(fp32, float, float)
}
