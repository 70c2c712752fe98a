// What an instruction-set level provides: fifteen operations (five ops in three dtypes), called with checked arguments.
// Each level compiles the same files in a namespace of its own, for its instructions; what they share comes from here.
#pragma once

#include "cna.h"
#include "dtypes.h"
#include "threads.h"
#include "workspace.h"

namespace cna {

template <class T>
struct Ops {
  int (*gated_mlp)(T *y, const T *x, const T *w_gate, const T *w_up, const T *w_down, const cna_extras &extras,
                   int64_t n_tokens, int64_t H, int64_t N, int64_t y_stride, int64_t x_stride, int64_t w_gate_up_stride,
                   int64_t w_down_stride, int n_threads);
  int (*swiglu)(T *act, const T *gate, const T *up, const cna_extras &extras, int64_t n_tokens, int64_t N,
                int64_t act_stride, int64_t gate_stride, int64_t up_stride, int n_threads);
  int (*steer_act)(T *steered, const T *act, const cna_extras &extras, int64_t n_tokens, int64_t N,
                   int64_t steered_stride, int64_t act_stride, int n_threads);
  int (*down_proj)(T *y, const T *act, const T *w_down, const cna_extras &extras, int64_t n_tokens, int64_t H,
                   int64_t N, int64_t y_stride, int64_t act_stride, int64_t w_down_stride, int n_threads);
  int (*linear)(T *y, const T *x, const T *w, const T *bias, int64_t n_tokens, int64_t O, int64_t H, int64_t y_stride,
                int64_t x_stride, int64_t w_stride, int n_threads);
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
