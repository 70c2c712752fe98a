// Products of few tokens with block weights: c[t, o] = sum_k x[t, k] * w[o, k]. Blocks are read once, straight from the
// file's bytes, and turned into fp32; x is fp32, too. Included inside a level's namespace.

constexpr int BLOCK_TOKENS = 4;  // tokens that share an unpacked block

// Calls run(g, w) with the vectors w[32 / W] of each of n groups g of 32 numbers, from the block at p on. n is 8, or
// less at the end of a row of blocks of 32.
#ifdef CNA_AVX512
#include "blocks_avx512.h"
#else
template <class Q, class Run>
__attribute__((always_inline)) inline void each_group(const uint8_t *p, int n, const Run &run) {
  constexpr int GROUPS = Q::ELEMENTS / Q::GROUP;
  for (int first = 0; first < n; first += Q::ELEMENTS / 32, p += Q::BYTES) {
    int8_t q[Q::ELEMENTS];
    float scale[GROUPS], offset[GROUPS];
    Q::unpack(q, scale, offset, p);
    for (int g = 0; g < Q::ELEMENTS / 32; g++) {
      F32 w[32 / W];
      for (int v = 0; v < 32 / W; v++) {
        const int at = 32 * g + v * W;
        w[v] = mul(load(q + at), set1(scale[at / Q::GROUP]));
        if (Q::OFFSETS) w[v] = add(w[v], set1(-offset[at / Q::GROUP]));
      }
      run(first + g, w);
    }
  }
}
#endif

// The same for a whole row, run(k, g, w) with the place k of the group's first number. The compiler sees that n is 8 in
// all calls but the last.
template <class Q, class Run>
__attribute__((always_inline)) inline void each_group_of_row(const uint8_t *p, int64_t K, const Run &run) {
  constexpr int BYTES = 256 / Q::ELEMENTS * Q::BYTES;
  int64_t k = 0;
  const auto at_k = [&](int g, const F32(&w)[32 / W]) __attribute__((always_inline)) { run(k + 32 * g, g, w); };
  for (; k + 256 <= K; k += 256, p += BYTES) {
    for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(p + FETCH_AHEAD + i);
    each_group<Q>(p, 8, at_k);
  }
  if (k < K) each_group<Q>(p, int(K - k) / 32, at_k);
}

// c[t * c_stride] = the product of a row of blocks with each of TOKENS tokens.
template <class Q, int TOKENS>
void block_row(float *c, int64_t c_stride, const uint8_t *w, const float *x, int64_t x_stride, int64_t K) {
  constexpr int CHAINS = W == 16 ? 4 : 2;  // of additions, so that few wait for the one before
  F32 sums[TOKENS][CHAINS];
  for (int t = 0; t < TOKENS; t++)
    for (F32 &sum : sums[t]) sum = zero();
  each_group_of_row<Q>(w, K, [&](int64_t k, int g, const F32(&weights)[32 / W]) __attribute__((always_inline)) {
    for (int t = 0; t < TOKENS; t++)
      for (int v = 0; v < 32 / W; v++) {
        F32 &sum = sums[t][(g * (32 / W) + v) % CHAINS];
        sum = fma(weights[v], load(x + t * x_stride + k + v * W), sum);
      }
  });
  for (int t = 0; t < TOKENS; t++) {
    for (int i = CHAINS / 2; i > 0; i /= 2)
      for (int j = 0; j < i; j++) sums[t][j] = add(sums[t][j], sums[t][j + i]);
    c[t * c_stride] = total(sums[t][0]);
  }
}

// c[T, O] from T tokens and O rows of blocks.
template <class Q>
void block_tile(float *c, int64_t c_stride, const uint8_t *w, int64_t row_bytes, int64_t O, const float *x,
                int64_t n_tokens, int64_t K) {
  for (int64_t o = 0; o < O; o++, w += row_bytes)
    for (int64_t t = 0, n; t < n_tokens; t += n) {
      float *to = c + t * c_stride + o;
      const float *from = x + t * K;
      n = n_tokens - t >= BLOCK_TOKENS ? BLOCK_TOKENS : n_tokens - t >= 2 ? 2 : 1;
      if (n == BLOCK_TOKENS)
        block_row<Q, BLOCK_TOKENS>(to, c_stride, w, from, K, K);
      else if (n == 2)
        block_row<Q, 2>(to, c_stride, w, from, K, K);
      else
        block_row<Q, 1>(to, c_stride, w, from, K, K);
    }
}

// The functions of BlockKernels.
inline void tile_of_blocks(float *c, int64_t c_stride, const Weights &w, int64_t row, int64_t O, const float *tokens,
                           int64_t n_tokens, int64_t K) {
  const uint8_t *blocks = static_cast<const uint8_t *>(w.at) + row * w.row_bytes;
  with_format(w.type, [&](auto format) {
    block_tile<decltype(format)>(c, c_stride, blocks, w.row_bytes, O, tokens, n_tokens, K);
  });
}

inline void numbers_of_blocks(float *out, const uint8_t *blocks, int type, int64_t n) {
  with_format(type, [&](auto format) {
    each_group_of_row<decltype(format)>(
        blocks, n, [&](int64_t k, int, const F32(&weights)[32 / W]) __attribute__((always_inline)) {
          for (int v = 0; v < 32 / W; v++) store(out + k + v * W, weights[v]);
        });
  });
}
