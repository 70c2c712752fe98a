/* The CPU engine of CNA kernels: the MLP of a Llama layer with streaming sums and sparse steering.
 *
 *   act             = silu(gate) * up                       in fp32, rounded once to the arrays' dtype
 *   act_sum[c, n]   += sum_t token_weight[t, c] * act[t, n]       in fp32, from the rounded act, before scaling
 *   act_sumsq[c, n] += sum_t token_weight[t, c] * act[t, n]^2     likewise; or both in fp64
 *   y               = (act * scale[row_circuit[t]]) @ w_down^T
 *
 * T tokens, H hidden size, N neurons, C columns of sums, K circuits. Arrays are row-major. A stride counts elements
 * from one row to the next and is at least the row's length (of an array without elements it may be anything); within a
 * row elements are adjacent. bf16 and fp16 arrays hold bit patterns. Sizes may be 0: an empty output is a success, and
 * pointers to empty arrays may be NULL.
 *
 * A status other than CNA_OK says what is wrong, and nothing has been written then. Results do not depend on n_threads.
 * Calls may come from any thread. After fork() a child computes on one thread: OpenMP's threads are not in the child.
 */
#ifndef CNA_H
#define CNA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define CNA_API __attribute__((visibility("default")))
#else
#define CNA_API
#endif

#define CNA_ABI_VERSION 3

typedef enum cna_status {
  CNA_OK = 0,
  CNA_ERR_VERSION = 1, /* extras->version is not this library's CNA_ABI_VERSION */
  CNA_ERR_NULL = 2,    /* a pointer to an array that is not empty is NULL, or half of a pair is missing */
  CNA_ERR_SIZE = 3,    /* a size is negative, or an array would be larger than an address space */
  CNA_ERR_STRIDE = 4,  /* a stride is smaller than its row */
  CNA_ERR_ALIGN = 5,   /* a pointer is not aligned to its element */
  CNA_ERR_OVERLAP = 6, /* an output shares memory with another array, or lies between its rows at another stride */
  CNA_ERR_SCALE = 7,   /* a circuit in use: offsets out of order, an index outside its block or not ascending */
  CNA_ERR_THREADS = 8, /* n_threads is below 1 */
  CNA_ERR_ISA = 9,     /* CNA_CPU_ISA or cna_use_isa names a level that is unknown or that this CPU lacks */
  CNA_ERR_MEMORY = 10, /* the workspace could not be allocated */
  CNA_ERR_TYPE = 11,   /* a cna_weight's type is neither a block format nor that of the function */
  CNA_ERR_BLOCK = 12   /* the rows of a cna_weight in a block format are not whole blocks */
} cna_status;

/* What the numbers of a cna_weight are. The numbers of the types are those of GGUF, the layouts of blocks those of
   ggml, as they lie in a file: w = scale * q - offset with scales and whole numbers of 4 to 8 bits. */
typedef enum cna_type {
  CNA_FP32 = 0,
  CNA_FP16 = 1,
  CNA_Q4_0 = 2,  /* blocks of 32 numbers in 18 bytes; likewise: */
  CNA_Q4_1 = 3,  /* 32 in 20 */
  CNA_Q5_0 = 6,  /* 32 in 22 */
  CNA_Q5_1 = 7,  /* 32 in 24 */
  CNA_Q8_0 = 8,  /* 32 in 34 */
  CNA_Q4_K = 12, /* 256 in 144 */
  CNA_Q5_K = 13, /* 256 in 176 */
  CNA_Q6_K = 14, /* 256 in 210 */
  CNA_BF16 = 30
} cna_type;

/* The rows of a matrix of weights. Blocks may lie at any address. */
typedef struct cna_weight {
  const void *at;
  int64_t type;      /* a cna_type */
  int64_t row_bytes; /* from one row to the next */
} cna_weight;

/* The optional arguments: sums, steering, or both. Set version, and every field that is not used to 0. */
typedef struct cna_extras {
  int64_t version; /* CNA_ABI_VERSION */
  /* Sums: token_weight with act_sum, act_sumsq or both, in fp32 or in fp64 (or in both: the last two fields). A token
     whose weights are all 0 is never read by the sums. A variance, sumsq / n - (sum / n)^2, needs fp64: in fp32 nothing
     is left of a spread below 1/1000 of the mean. */
  const float *token_weight; /* [T, C] how much each token counts in each column */
  float *act_sum;            /* [C, N] added to, or NULL */
  float *act_sumsq;          /* [C, N] added to, or NULL */
  int64_t n_columns;         /* C */
  int64_t token_weight_stride;
  int64_t act_sum_stride;
  int64_t act_sumsq_stride;
  /* Steering: row_circuit with offsets, index and value. Circuit c multiplies neuron index[e] by value[e] for every
     entry e from offsets[c, 0] up to offsets[c, last]; its entries for neurons 1024 b up to 1024 (b + 1) start at
     offsets[c, b]. Within a circuit index ascends strictly. A value of 0 writes exactly 0. */
  const int32_t *row_circuit; /* [T] the circuit of each token; outside 0 .. K - 1: none */
  const int32_t *offsets;     /* [K, ceil(N / 1024) + 1] */
  const int32_t *index;       /* [E] */
  const float *value;         /* [E] */
  int64_t n_circuits;         /* K */
  int64_t n_entries;          /* E */
  int64_t offsets_stride;
  double *act_sum_fp64;   /* [C, N] added to, or NULL; rows are act_sum_stride apart, as those of act_sum */
  double *act_sumsq_fp64; /* [C, N] added to, or NULL; rows are act_sumsq_stride apart */
} cna_extras;

CNA_API int cna_abi_version(void);
CNA_API const char *cna_status_text(int status); /* one line, never NULL */
CNA_API int cna_has_openmp(void);                /* 0: built without OpenMP, every call uses one thread */

/* Instruction sets. The best one that the CPU has is used, or the one named by the environment variable CNA_CPU_ISA. */
CNA_API const char *cna_isa_levels(void);  /* levels of this CPU, best last: "generic avx2 avx512 avx512_bf16" */
CNA_API const char *cna_isa(void);         /* the level in use; "" where CNA_CPU_ISA names one that this CPU lacks */
CNA_API int cna_use_isa(const char *name); /* use a level for all calls from now on; NULL: the default */

/* y[T, H] = the whole MLP: gate = x @ w_gate^T and up = x @ w_up^T stay in fp32.
   x [T, H], w_gate and w_up [N, H] with one stride (halves of one [2N, H] array are fine), w_down [H, N]. */
CNA_API int cna_gated_mlp_bf16(uint16_t *y, const uint16_t *x, const uint16_t *w_gate, const uint16_t *w_up,
                               const uint16_t *w_down, const cna_extras *extras, int64_t T, int64_t H, int64_t N,
                               int64_t y_stride, int64_t x_stride, int64_t w_gate_up_stride, int64_t w_down_stride,
                               int n_threads);
CNA_API int cna_gated_mlp_fp16(uint16_t *y, const uint16_t *x, const uint16_t *w_gate, const uint16_t *w_up,
                               const uint16_t *w_down, const cna_extras *extras, int64_t T, int64_t H, int64_t N,
                               int64_t y_stride, int64_t x_stride, int64_t w_gate_up_stride, int64_t w_down_stride,
                               int n_threads);
CNA_API int cna_gated_mlp_fp32(float *y, const float *x, const float *w_gate, const float *w_up, const float *w_down,
                               const cna_extras *extras, int64_t T, int64_t H, int64_t N, int64_t y_stride,
                               int64_t x_stride, int64_t w_gate_up_stride, int64_t w_down_stride, int n_threads);

/* act[T, N] = silu(gate) * up, scaled. gate [T, N], up [T, N]. */
CNA_API int cna_swiglu_bf16(uint16_t *act, const uint16_t *gate, const uint16_t *up, const cna_extras *extras,
                            int64_t T, int64_t N, int64_t act_stride, int64_t gate_stride, int64_t up_stride,
                            int n_threads);
CNA_API int cna_swiglu_fp16(uint16_t *act, const uint16_t *gate, const uint16_t *up, const cna_extras *extras,
                            int64_t T, int64_t N, int64_t act_stride, int64_t gate_stride, int64_t up_stride,
                            int n_threads);
CNA_API int cna_swiglu_fp32(float *act, const float *gate, const float *up, const cna_extras *extras, int64_t T,
                            int64_t N, int64_t act_stride, int64_t gate_stride, int64_t up_stride, int n_threads);

/* steered[T, N] = act * scale, for programs that compute act and down_proj themselves. act [T, N]. steered may be act
   itself, with the same stride: then only steered neurons are written. */
CNA_API int cna_steer_act_bf16(uint16_t *steered, const uint16_t *act, const cna_extras *extras, int64_t T, int64_t N,
                               int64_t steered_stride, int64_t act_stride, int n_threads);
CNA_API int cna_steer_act_fp16(uint16_t *steered, const uint16_t *act, const cna_extras *extras, int64_t T, int64_t N,
                               int64_t steered_stride, int64_t act_stride, int n_threads);
CNA_API int cna_steer_act_fp32(float *steered, const float *act, const cna_extras *extras, int64_t T, int64_t N,
                               int64_t steered_stride, int64_t act_stride, int n_threads);

/* y[T, H] = (act * scale) @ w_down^T. act [T, N], w_down [H, N]. */
CNA_API int cna_down_proj_bf16(uint16_t *y, const uint16_t *act, const uint16_t *w_down, const cna_extras *extras,
                               int64_t T, int64_t H, int64_t N, int64_t y_stride, int64_t act_stride,
                               int64_t w_down_stride, int n_threads);
CNA_API int cna_down_proj_fp16(uint16_t *y, const uint16_t *act, const uint16_t *w_down, const cna_extras *extras,
                               int64_t T, int64_t H, int64_t N, int64_t y_stride, int64_t act_stride,
                               int64_t w_down_stride, int n_threads);
CNA_API int cna_down_proj_fp32(float *y, const float *act, const float *w_down, const cna_extras *extras, int64_t T,
                               int64_t H, int64_t N, int64_t y_stride, int64_t act_stride, int64_t w_down_stride,
                               int n_threads);

/* y[T, O] = x @ w^T + bias: any other linear layer. x [T, H], w [O, H], bias [O] or NULL. */
CNA_API int cna_linear_bf16(uint16_t *y, const uint16_t *x, const uint16_t *w, const uint16_t *bias, int64_t T,
                            int64_t O, int64_t H, int64_t y_stride, int64_t x_stride, int64_t w_stride, int n_threads);
CNA_API int cna_linear_fp16(uint16_t *y, const uint16_t *x, const uint16_t *w, const uint16_t *bias, int64_t T,
                            int64_t O, int64_t H, int64_t y_stride, int64_t x_stride, int64_t w_stride, int n_threads);
CNA_API int cna_linear_fp32(float *y, const float *x, const float *w, const float *bias, int64_t T, int64_t O,
                            int64_t H, int64_t y_stride, int64_t x_stride, int64_t w_stride, int n_threads);

/* The same three with weights in blocks, or of the function's own type. Products are those with the numbers that the
   blocks stand for, in fp32 at few tokens; at more tokens these are rounded to the function's type first. x, act and y
   are never quantised. */
CNA_API int cna_gated_mlp_typed_bf16(uint16_t *y, const uint16_t *x, const cna_weight *w_gate, const cna_weight *w_up,
                                     const cna_weight *w_down, const cna_extras *extras, int64_t T, int64_t H,
                                     int64_t N, int64_t y_stride, int64_t x_stride, int n_threads);
CNA_API int cna_gated_mlp_typed_fp16(uint16_t *y, const uint16_t *x, const cna_weight *w_gate, const cna_weight *w_up,
                                     const cna_weight *w_down, const cna_extras *extras, int64_t T, int64_t H,
                                     int64_t N, int64_t y_stride, int64_t x_stride, int n_threads);
CNA_API int cna_gated_mlp_typed_fp32(float *y, const float *x, const cna_weight *w_gate, const cna_weight *w_up,
                                     const cna_weight *w_down, const cna_extras *extras, int64_t T, int64_t H,
                                     int64_t N, int64_t y_stride, int64_t x_stride, int n_threads);
CNA_API int cna_down_proj_typed_bf16(uint16_t *y, const uint16_t *act, const cna_weight *w_down,
                                     const cna_extras *extras, int64_t T, int64_t H, int64_t N, int64_t y_stride,
                                     int64_t act_stride, int n_threads);
CNA_API int cna_down_proj_typed_fp16(uint16_t *y, const uint16_t *act, const cna_weight *w_down,
                                     const cna_extras *extras, int64_t T, int64_t H, int64_t N, int64_t y_stride,
                                     int64_t act_stride, int n_threads);
CNA_API int cna_down_proj_typed_fp32(float *y, const float *act, const cna_weight *w_down, const cna_extras *extras,
                                     int64_t T, int64_t H, int64_t N, int64_t y_stride, int64_t act_stride,
                                     int n_threads);
CNA_API int cna_linear_typed_bf16(uint16_t *y, const uint16_t *x, const cna_weight *w, const uint16_t *bias, int64_t T,
                                  int64_t O, int64_t H, int64_t y_stride, int64_t x_stride, int n_threads);
CNA_API int cna_linear_typed_fp16(uint16_t *y, const uint16_t *x, const cna_weight *w, const uint16_t *bias, int64_t T,
                                  int64_t O, int64_t H, int64_t y_stride, int64_t x_stride, int n_threads);
CNA_API int cna_linear_typed_fp32(float *y, const float *x, const cna_weight *w, const float *bias, int64_t T,
                                  int64_t O, int64_t H, int64_t y_stride, int64_t x_stride, int n_threads);

/* A layer of a Llama or Qwen. Norms, biases and the cache hold numbers of the function's type. */
typedef struct cna_layer {
  const void *input_norm, *post_norm; /* [H] */
  const void *q_norm, *k_norm;        /* [D], or NULL */
  cna_weight w_q, w_k, w_v, w_o;      /* [n_heads * D, H], twice [n_kv_heads * D, H], [H, n_heads * D] */
  cna_weight w_gate, w_up, w_down;    /* [N, H] twice, [H, N] */
  const void *b_q, *b_k, *b_v, *b_o;  /* as many numbers as their weights have rows, or NULL */
  void *keys, *values;                /* [T, n_kv_heads, length, D], see cna_decoder */
  int64_t window;                     /* a token sees so many tokens, itself among them; 0: all */
} cna_layer;

typedef struct cna_decoder {
  int64_t version;         /* CNA_ABI_VERSION */
  const cna_layer *layers; /* [n_layers] */
  const void *norm;        /* [H] the last norm */
  int64_t n_layers, H, N, n_heads, n_kv_heads, D;
  int64_t length, cache_row,
      cache_head; /* tokens that the caches have room for; numbers from row to row, head to head */
  double eps;
} cna_decoder;

/* A step of decoding: one token of each of T sequences through all layers. hidden[T, H] is the normed stream, whose
   product with the output matrix is the logits.
   x [T, H] the embeddings; position [T], below length: where keys and values go, and up to where the token looks; cos
   and sin [T, D], the halves of D being the coordinates of each rotation; extras [n_layers] sums and steering, or NULL.
 */
CNA_API int cna_decode_bf16(uint16_t *hidden, const uint16_t *x, const cna_decoder *decoder, const int64_t *position,
                            const uint16_t *cos, const uint16_t *sin, const cna_extras *extras, int64_t T,
                            int64_t hidden_stride, int64_t x_stride, int64_t rotation_stride, int n_threads);
CNA_API int cna_decode_fp16(uint16_t *hidden, const uint16_t *x, const cna_decoder *decoder, const int64_t *position,
                            const uint16_t *cos, const uint16_t *sin, const cna_extras *extras, int64_t T,
                            int64_t hidden_stride, int64_t x_stride, int64_t rotation_stride, int n_threads);
CNA_API int cna_decode_fp32(float *hidden, const float *x, const cna_decoder *decoder, const int64_t *position,
                            const float *cos, const float *sin, const cna_extras *extras, int64_t T,
                            int64_t hidden_stride, int64_t x_stride, int64_t rotation_stride, int n_threads);

/* out[O, H] = the numbers that w [O, H], in a block format, stands for, rounded once from fp32. */
CNA_API int cna_dequantize_bf16(uint16_t *out, const cna_weight *w, int64_t O, int64_t H, int64_t out_stride,
                                int n_threads);
CNA_API int cna_dequantize_fp16(uint16_t *out, const cna_weight *w, int64_t O, int64_t H, int64_t out_stride,
                                int n_threads);
CNA_API int cna_dequantize_fp32(float *out, const cna_weight *w, int64_t O, int64_t H, int64_t out_stride,
                                int n_threads);

#ifdef __cplusplus
}
#endif

#endif
