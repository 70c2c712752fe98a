// Products of few tokens: c[t, o] = sum_k x[t, k] * w[o, k], with vectors along k. Every weight is read once, straight
// from the checkpoint's array; the tokens are prepared once. Included inside a level's namespace.
//
// A piece is 2 W neighbouring elements. Its order inside the two vectors is whatever is cheapest to load; tokens go
// through the same load when they are prepared, so that the orders agree.

constexpr int DOT_TOKENS = 4;  // accumulators: DOT_TOKENS x DOT_ROWS vectors
constexpr int DOT_ROWS = 4;

// One token: rows of weights of SHORT_ROW bytes or more are read four at once, each a stream of its own to the
// processor; shorter ones one by one, in the order of memory, which is asked for FETCH_AHEAD bytes before it is used:
// the processor itself fetches to the end of a page of 4 KiB at most. Of a plain read's bandwidth that is 1.2 (rows of
// 4 KiB) and 1.0 (of 1152 bytes); one by one without fetching it was 0.8 and 0.75 (bf16, 2 cores of Emerald Rapids,
// 2026-11-27).
constexpr int64_t SHORT_ROW = 4096, FETCH_AHEAD = 4096;

template <class T>
struct Dot {
  typedef float Token;  // an element of prepared tokens
  struct Piece {
    F32 a, b;
  };
  static constexpr int PIECE = 2 * W;
  static Piece weights(const T *w) { return {load(w), load(w + W)}; }
  static Piece tokens(const Token *x) { return {load(x), load(x + W)}; }
  static void prepare(Token *out, const T *x) {
    const Piece piece = weights(x);
    store(out, piece.a);
    store(out + W, piece.b);
  }
  static F32 add_product(F32 sum, Piece w, Piece x) { return fma(w.b, x.b, fma(w.a, x.a, sum)); }
};

#ifdef CNA_BF16_PAIRS
// The processor multiplies pairs of bf16 and adds both products to an fp32 lane.
template <>
struct Dot<Bf16> {
  typedef Bf16 Token;
  typedef __m512bh Piece;
  static constexpr int PIECE = 2 * W;
  static Piece weights(const Bf16 *w) { return (__m512bh)_mm512_loadu_si512(w); }
  static Piece tokens(const Token *x) { return weights(x); }
  static void prepare(Token *out, const Bf16 *x) { std::memcpy(out, x, PIECE * sizeof *out); }
  static F32 add_product(F32 sum, Piece w, Piece x) { return _mm512_dpbf16_ps(sum, w, x); }
};
#else
// One shift and one mask widen 2 W weights.
template <>
inline Dot<Bf16>::Piece Dot<Bf16>::weights(const Bf16 *w) {
  const F32 pairs = load_words(w);
  return {low_halves(pairs), high_halves(pairs)};
}
#endif

// Prepares one token as the kernels read it: [K rounded up to a piece], zeros at the end.
template <class T>
void prepare_dot(typename Dot<T>::Token *out, const T *x, int64_t K) {
  typedef Dot<T> D;
  int64_t k = 0;
  for (; k + D::PIECE <= K; k += D::PIECE) D::prepare(out + k, x + k);
  if (k < K) {
    T rest[D::PIECE] = {};
    std::memcpy(rest, x + k, (K - k) * sizeof(T));
    D::prepare(out + k, rest);
  }
}

// c[TOKENS, ROWS] from TOKENS prepared tokens and ROWS rows of weights. Meanwhile fetches n_ahead rows from `ahead` on.
template <class T, int TOKENS, int ROWS>
void dot_block(float *c, int64_t c_stride, const T *w, int64_t w_stride, const typename Dot<T>::Token *x,
               int64_t x_stride, int64_t K, const T *ahead, int n_ahead) {
  typedef Dot<T> D;
  F32 sums[TOKENS][ROWS];
  for (int t = 0; t < TOKENS; t++)
    for (int r = 0; r < ROWS; r++) sums[t][r] = zero();

  int64_t k = 0;
  for (; k + D::PIECE <= K; k += D::PIECE) {
    for (int r = 0; r < n_ahead; r++) __builtin_prefetch(ahead + r * w_stride + k);
    typename D::Piece tokens[TOKENS];
    for (int t = 0; t < TOKENS; t++) tokens[t] = D::tokens(x + t * x_stride + k);
    for (int r = 0; r < ROWS; r++) {
      const typename D::Piece weights = D::weights(w + r * w_stride + k);
      for (int t = 0; t < TOKENS; t++) sums[t][r] = D::add_product(sums[t][r], weights, tokens[t]);
    }
  }
  if (k < K) {  // the rest of a row may end where memory ends
    for (int r = 0; r < ROWS; r++) {
      T rest[D::PIECE] = {};
      std::memcpy(rest, w + r * w_stride + k, (K - k) * sizeof(T));
      const typename D::Piece weights = D::weights(rest);
      for (int t = 0; t < TOKENS; t++)
        sums[t][r] = D::add_product(sums[t][r], weights, D::tokens(x + t * x_stride + k));
    }
  }
  for (int t = 0; t < TOKENS; t++)
    for (int r = 0; r < ROWS; r++) c[t * c_stride + r] = total(sums[t][r]);
}

// The product of one token and one row of weights, in four chains of additions.
template <class T>
float dot_row(const T *w, const typename Dot<T>::Token *x, int64_t K) {
  typedef Dot<T> D;
  F32 sums[4] = {zero(), zero(), zero(), zero()};
  int64_t k = 0;
  for (; k + 4 * D::PIECE <= K; k += 4 * D::PIECE)
    for (int i = 0; i < 4; i++) {
      const char *ahead = reinterpret_cast<const char *>(w + k + i * D::PIECE) + FETCH_AHEAD;
      for (size_t line = 0; line < D::PIECE * sizeof *w; line += 64) __builtin_prefetch(ahead + line);
      sums[i] = D::add_product(sums[i], D::weights(w + k + i * D::PIECE), D::tokens(x + k + i * D::PIECE));
    }
  for (; k + D::PIECE <= K; k += D::PIECE) sums[0] = D::add_product(sums[0], D::weights(w + k), D::tokens(x + k));
  if (k < K) {
    T rest[D::PIECE] = {};
    std::memcpy(rest, w + k, (K - k) * sizeof(T));
    sums[1] = D::add_product(sums[1], D::weights(rest), D::tokens(x + k));
  }
  return total(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// c[T, O] from T prepared tokens and O rows of weights: DOT_ROWS rows stay in cache while all tokens pass, DOT_TOKENS
// at a time. Memory would be idle during the passes after the first, so each pass fetches its share of the next rows:
// 10% less time at 16 tokens. A single pass reads memory anyway, and fetching ahead costs it 5% (2 cores of Zen 4,
// 2026-11-21).
template <class T>
void dot_tile(float *c, int64_t c_stride, const T *w, int64_t w_stride, int64_t O, const typename Dot<T>::Token *x,
              int64_t x_stride, int64_t n_tokens, int64_t K) {
  if (n_tokens == 1 && K * int64_t(sizeof *w) < SHORT_ROW) {
    for (int64_t o = 0; o < O; o++) c[o] = dot_row(w + o * w_stride, x, K);
    return;
  }
  const int64_t passes = (n_tokens + DOT_TOKENS - 1) / DOT_TOKENS;
  for (int64_t o = 0; o < O; o += DOT_ROWS) {
    const bool fetches = passes > 1 && o + 2 * DOT_ROWS <= O;
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t t = pass * DOT_TOKENS;
      const int64_t tokens = smaller(n_tokens - t, DOT_TOKENS), rows = smaller(O - o, DOT_ROWS);
      const int64_t first = DOT_ROWS * pass / passes, last = DOT_ROWS * (pass + 1) / passes;
      const int n_ahead = fetches ? int(last - first) : 0;
      const T *w_block = w + o * w_stride, *ahead = fetches ? w_block + (DOT_ROWS + first) * w_stride : nullptr;
      float *c_block = c + t * c_stride + o;
      const typename Dot<T>::Token *x_block = x + t * x_stride;
#define CNA_DOT(TOKENS, ROWS) \
  dot_block<T, TOKENS, ROWS>(c_block, c_stride, w_block, w_stride, x_block, x_stride, K, ahead, n_ahead)
      if (rows == DOT_ROWS) {
        if (tokens == 4) CNA_DOT(4, DOT_ROWS);
        if (tokens == 3) CNA_DOT(3, DOT_ROWS);
        if (tokens == 2) CNA_DOT(2, DOT_ROWS);
        if (tokens == 1) CNA_DOT(1, DOT_ROWS);
        continue;
      }
      for (int64_t r = 0; r < rows; r++, c_block++, w_block += w_stride) {
        if (tokens == 4) CNA_DOT(4, 1);
        if (tokens == 3) CNA_DOT(3, 1);
        if (tokens == 2) CNA_DOT(2, 1);
        if (tokens == 1) CNA_DOT(1, 1);
      }
#undef CNA_DOT
    }
  }
}

// How mlp.h uses this file; ByPanel of panel.h and ByTiles of amx.h have the same functions except stride.
template <class T>
struct ByDot {
  typedef typename Dot<T>::Token Token;
  static int64_t stride(int64_t K) { return round_up(K, Dot<T>::PIECE); }
  static int64_t token_bytes(int64_t n_tokens, int64_t K) { return n_tokens * stride(K) * sizeof(Token); }

  // Tokens are prepared in blocks: block b holds the tokens from first_token(b) up to first_token(b + 1).
  static int64_t n_blocks(int64_t n_tokens) { return n_tokens; }
  static int64_t first_token(int64_t block, int64_t) { return block; }
  static void prepare(void *tokens, const T *x, int64_t, int64_t t, int64_t, int64_t K) {
    prepare_dot(static_cast<Token *>(tokens) + t * stride(K), x, K);
  }

  static void tile(float *c, int64_t c_stride, const T *w, int64_t w_stride, int64_t O, const void *tokens,
                   int64_t n_tokens, int64_t K, const T *, float *) {
    dot_tile(c, c_stride, w, w_stride, O, static_cast<const Token *>(tokens), stride(K), n_tokens, K);
  }
};
