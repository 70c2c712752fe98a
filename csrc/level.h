// What an instruction-set level provides: 21 operations (seven in three dtypes), called with checked arguments.
// Each level compiles the same files in a namespace of its own, for its instructions; what they share comes from here.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "cna.h"
#include "dtypes.h"
#include "threads.h"
#include "workspace.h"

namespace cna {

// Rows of weights: the first row, bytes from one row to the next, and what they hold: a cna_type.
struct Weights {
  const void *at;
  int64_t row_bytes;
  int type;
};

static constexpr int type_of(Bf16) { return CNA_BF16; }
static constexpr int type_of(Fp16) { return CNA_FP16; }
static constexpr int type_of(float) { return CNA_FP32; }

// Numbers in a block and its bytes, of the block formats; 0 for other types.
struct BlockSize {
  int elements, bytes;
};
static constexpr BlockSize block_size(int64_t type) {
  switch (type) {
    case CNA_Q4_0: return {32, 18};
    case CNA_Q4_1: return {32, 20};
    case CNA_Q5_0: return {32, 22};
    case CNA_Q5_1: return {32, 24};
    case CNA_Q8_0: return {32, 34};
    case CNA_Q4_K: return {256, 144};
    case CNA_Q5_K: return {256, 176};
    case CNA_Q6_K: return {256, 210};
    default: return {0, 0};
  }
}

// The products with weights in blocks, of fp32 tokens, and the numbers of blocks: compiled once for the levels that
// would compile the same code.
struct BlockKernels {
  // c[n_tokens, O] from tokens [n_tokens, K] and the rows of w from `row` on
  void (*tile)(float *c, int64_t c_stride, const Weights &w, int64_t row, int64_t O, const float *tokens,
               int64_t n_tokens, int64_t K);
  // out[n] = the numbers of the blocks at `blocks`
  void (*numbers)(float *out, const uint8_t *blocks, int type, int64_t n);
};
extern const BlockKernels BLOCKS_GENERIC, BLOCKS_AVX2, BLOCKS_AVX512, BLOCKS_NEON;

// The same rounded to bf16, for the levels that have products of bf16 pairs.
extern void (*const BF16_OF_BLOCKS)(Bf16 *out, const uint8_t *blocks, int type, int64_t n);

// A cna_layer and a cna_decoder whose arguments are checked.
struct Layer {
  const void *input_norm, *post_norm, *q_norm, *k_norm;
  Weights w_q, w_k, w_v, w_o, w_gate, w_up, w_down;
  const void *b_q, *b_k, *b_v, *b_o;
  void *keys, *values;
  int64_t window;
};
struct WeightList {
  const Weights *const *first;
  int64_t n;
  __attribute__((always_inline)) const Weights *const *begin() const { return first; }
  __attribute__((always_inline)) const Weights *const *end() const { return first + n; }
};
struct Decoder {
  const Layer *layers;
  const void *norm;
  int64_t n_layers, H, N, n_heads, n_kv_heads, D, length, cache_row, cache_head;
  double eps;
  WeightList of_stream, of_heads, of_act;  // all weights that the stream, the heads' results and act meet
};

template <class T>
struct Ops {
  int (*gated_mlp)(T *y, const T *x, const Weights &w_gate, const Weights &w_up, const Weights &w_down,
                   const cna_extras &extras, int64_t n_tokens, int64_t H, int64_t N, int64_t y_stride, int64_t x_stride,
                   int n_threads);
  int (*swiglu)(T *act, const T *gate, const T *up, const cna_extras &extras, int64_t n_tokens, int64_t N,
                int64_t act_stride, int64_t gate_stride, int64_t up_stride, int n_threads);
  int (*steer_act)(T *steered, const T *act, const cna_extras &extras, int64_t n_tokens, int64_t N,
                   int64_t steered_stride, int64_t act_stride, int n_threads);
  int (*down_proj)(T *y, const T *act, const Weights &w_down, const cna_extras &extras, int64_t n_tokens, int64_t H,
                   int64_t N, int64_t y_stride, int64_t act_stride, int n_threads);
  int (*linear)(T *y, const T *x, const Weights &w, const T *bias, int64_t n_tokens, int64_t O, int64_t H,
                int64_t y_stride, int64_t x_stride, int n_threads);
  int (*dequantize)(T *out, const Weights &w, int64_t n_rows, int64_t K, int64_t out_stride, int n_threads);
  int (*decode)(T *hidden, const T *x, const Decoder &decoder, const int64_t *position, const T *cos, const T *sin,
                const cna_extras *extras, int64_t n_tokens, int64_t hidden_stride, int64_t x_stride,
                int64_t rotation_stride, int n_threads);
};

struct Level {
  const char *name;
  Ops<Bf16> bf16;
  Ops<Fp16> fp16;
  Ops<float> fp32;
};

extern const Level LEVEL_GENERIC;
#if defined(__x86_64__)
extern const Level LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512_BF16;
#if __has_include(<amxbf16intrin.h>) || (defined(__clang__) && __clang_major__ >= 11)  // gcc 11
#define CNA_COMPILES_AMX
extern const Level LEVEL_AMX;
#endif
#elif defined(__aarch64__)
extern const Level LEVEL_NEON;
#endif

}  // namespace cna
