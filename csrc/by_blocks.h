// Weights in blocks, as mlp.h uses them; the kernels are those that the level names, block_kernels. Included inside a
// level's namespace.

// Products of few tokens; see ByDot of dot.h. K is a multiple of 32.
template <class T>
struct ByBlocks {
  static int64_t token_bytes(int64_t n_tokens, int64_t K) { return n_tokens * K * sizeof(float); }
  static int64_t n_blocks(int64_t n_tokens) { return n_tokens; }
  static int64_t first_token(int64_t block, int64_t) { return block; }
  static void prepare(void *tokens, const T *x, int64_t, int64_t t, int64_t, int64_t K) {
    float *out = static_cast<float *>(tokens) + t * K;
    for (int64_t k = 0; k < K; k += W) store(out + k, load(x + k));
  }
  static void tile(float *c, int64_t c_stride, const Weights &w, int64_t row, int64_t O, const void *tokens,
                   int64_t n_tokens, int64_t K) {
    block_kernels.tile(c, c_stride, w, row, O, static_cast<const float *>(tokens), n_tokens, K);
  }
};

// out[n_rows, K] = the numbers of rows of blocks, rounded to T.
template <class T>
void dequantize_rows(T *out, int64_t out_stride, const Weights &w, int64_t row, int64_t n_rows, int64_t K) {
  constexpr int64_t SOME = 2048;  // numbers at a time: whole blocks of every format
  const int64_t some_bytes = SOME / block_size(w.type).elements * block_size(w.type).bytes;
  for (int64_t r = 0; r < n_rows; r++, out += out_stride) {
    const uint8_t *blocks = static_cast<const uint8_t *>(w.at) + (row + r) * w.row_bytes;
    for (int64_t k = 0; k < K; k += SOME, blocks += some_bytes) {
      float numbers[SOME];
      const int64_t n = smaller(K - k, SOME);
      block_kernels.numbers(numbers, blocks, w.type, n);
      for (int64_t i = 0; i < n; i += W) store(out + k + i, load(numbers + i));
    }
  }
}
#ifdef CNA_BF16_PAIRS
template <>
inline void dequantize_rows(Bf16 *out, int64_t out_stride, const Weights &w, int64_t row, int64_t n_rows, int64_t K) {
  const uint8_t *blocks = static_cast<const uint8_t *>(w.at) + row * w.row_bytes;
  for (int64_t r = 0; r < n_rows; r++) BF16_OF_BLOCKS(out + r * out_stride, blocks + r * w.row_bytes, w.type, K);
}
#endif
