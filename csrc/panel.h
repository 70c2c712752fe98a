// Products of many tokens: c[t, o] = sum_k x[t, k] * w[o, k], with vectors along o. Blocks of weights are widened and
// turned into panels once, and all tokens pass over them. Included inside a level's namespace.
//
// A panel holds up to UNITS steps of k for PANEL rows of weights: panel[unit][PANEL]. A unit is 32 bits: one fp32
// value, or, where the processor multiplies pairs, two neighbouring bf16 values. Every sum is a chain of fp32 additions
// over the k of a block, and then over blocks: a token's result does not depend on its neighbours.

constexpr int PANEL = TILE_VECTORS * W;  // rows of weights in a panel

// Steps of k in a panel. Panels of 1024 steps take 3 to 5% less time with bf16 than those of 256 (2 cores of Zen 4,
// 2026-11-21). But a sum is one chain of additions over a panel, and in fp32 a chain of 1024 rounds visibly more than
// PyTorch's sums do.
template <class T>
constexpr int UNITS = sizeof(T) == 4 ? 256 : 1024;

template <class T>
struct Unit {
  static constexpr int ELEMENTS = 1;  // values of k in a unit
  static F32 add_product(F32 sum, F32 weights, const float *x) { return fma(weights, set1(*x), sum); }
};

#ifdef CNA_BF16_PAIRS
template <>
struct Unit<Bf16> {
  static constexpr int ELEMENTS = 2;
  static F32 add_product(F32 sum, F32 weights, const float *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)set1(*x));
  }
};
#endif

// The weights that will be packed next: fetched towards the cache a few lines at a time while the processor multiplies.
// Without this the time to read weights and the time to multiply add up: 10 to 20% at 5 to 32 tokens of bf16. Fetching
// while packing, too, costs 8% (2 cores of Zen 4, 2026-11-21).
struct Ahead {
  const char *line, *row_end;
  int64_t row_bytes, stride_bytes, n_lines;

  Ahead(const void *first, int64_t rows, int64_t row_bytes, int64_t stride_bytes)
      : line(static_cast<const char *>(first)),
        row_end(first ? line + row_bytes : line),
        row_bytes(row_bytes),
        stride_bytes(stride_bytes),
        n_lines(first ? rows * ((row_bytes + 63) / 64) : 0) {}

  void fetch(int64_t n) {
    for (; n > 0 && n_lines > 0; n--, n_lines--) {
      __builtin_prefetch(line, 0, 2);
      line += 64;
      if (line >= row_end) {
        row_end += stride_bytes;
        line = row_end - row_bytes;
      }
    }
  }
};

// W rows of W 32-bit words, from memory that may end before them: words past `n_rows` rows or `n_elements` are 0.
template <class T>
void load_rows(F32 (&r)[W], const T *w, int64_t w_stride, int64_t n_rows, int64_t n_elements) {
  constexpr int ELEMENTS = 4 * W / sizeof(T);
  if (n_rows >= W && n_elements >= ELEMENTS) {
    for (int i = 0; i < W; i++) r[i] = load_words(w + i * w_stride);
    return;
  }
  for (int i = 0; i < W; i++) {
    T row[ELEMENTS] = {};
    const int64_t n = n_elements < ELEMENTS ? n_elements : ELEMENTS;
    if (i < n_rows) std::memcpy(row, w + i * w_stride, n * sizeof(T));
    r[i] = load_words(row);
  }
}

inline void store_unit(float *panel, int64_t unit, int64_t width, int64_t n_units, F32 a) {
  store_some(panel + unit * width, a, (n_units - unit) * width >= W ? W : width);
}

// Fills panel[unit][0 : n_rows] from n_rows rows of K elements, at most W of them, with `width` floats from one unit to
// the next. Stores whole vectors where these end inside the panel; the next units overwrite what lies behind a unit.
inline void pack_rows(float *panel, int64_t width, const float *w, int64_t w_stride, int64_t n_rows, int64_t K) {
  for (int64_t k = 0; k < K; k += W) {
    F32 r[W];
    load_rows(r, w + k, w_stride, n_rows, K - k);
    transpose(r);
    for (int i = 0; i < W && k + i < K; i++) store_unit(panel, k + i, width, K, r[i]);
  }
}
inline void pack_rows(float *panel, int64_t width, const Fp16 *w, int64_t w_stride, int64_t n_rows, int64_t K) {
  for (int64_t k = 0; k < K; k += W) {
    F32 r[W];
    for (int i = 0; i < W; i++) {
      Fp16 row[W] = {};
      const int64_t n = K - k < W ? K - k : W;
      if (i < n_rows && n == W) {
        r[i] = load(w + i * w_stride + k);
        continue;
      }
      if (i < n_rows) std::memcpy(row, w + i * w_stride + k, n * sizeof *row);
      r[i] = load(row);
    }
    transpose(r);
    for (int i = 0; i < W && k + i < K; i++) store_unit(panel, k + i, width, K, r[i]);
  }
}
inline void pack_rows(float *panel, int64_t width, const Bf16 *w, int64_t w_stride, int64_t n_rows, int64_t K) {
  for (int64_t k = 0; k < K; k += 2 * W) {
    F32 r[W];
    load_rows(r, w + k, w_stride, n_rows, K - k);
    transpose(r);
#ifdef CNA_BF16_PAIRS
    for (int i = 0; i < W && k + 2 * i < K; i++) store_unit(panel, k / 2 + i, width, (K + 1) / 2, r[i]);
#else
    for (int i = 0; i < W && k + 2 * i < K; i++) {
      store_unit(panel, k + 2 * i, width, K, low_halves(r[i]));
      if (k + 2 * i + 1 < K) store_unit(panel, k + 2 * i + 1, width, K, high_halves(r[i]));
    }
#endif
  }
}

// ceil(O / PANEL) panels from O rows of K elements; zeros where there is no row.
template <class T>
void pack_panels(float *panels, const T *w, int64_t w_stride, int64_t O, int64_t K) {
  const int64_t n_units = (K + Unit<T>::ELEMENTS - 1) / Unit<T>::ELEMENTS;
  for (int64_t o = 0; o < round_up(O, PANEL); o += W) {
    float *columns = panels + o / PANEL * PANEL * UNITS<T> + o % PANEL;
    if (o < O)
      pack_rows(columns, PANEL, w + o * w_stride, w_stride, O - o, K);
    else
      for (int64_t unit = 0; unit < n_units; unit++) store(columns + unit * PANEL, zero());
  }
}

// c[TOKENS, PANEL] += x[TOKENS, n_units] @ panel, or = for the first block of k.
template <class U, int TOKENS>
void panel_block(float *c, int64_t c_stride, const float *panel, const float *x, int64_t n_units, bool first,
                 Ahead &ahead, int64_t lines) {
  F32 sums[TOKENS][TILE_VECTORS];
  for (int t = 0; t < TOKENS; t++)
    for (int v = 0; v < TILE_VECTORS; v++) sums[t][v] = zero();
  for (int64_t unit = 0; unit < n_units; unit++, panel += PANEL) {
    ahead.fetch(lines);
    F32 weights[TILE_VECTORS];
    for (int v = 0; v < TILE_VECTORS; v++) weights[v] = load(panel + v * W);
    for (int t = 0; t < TOKENS; t++)
      for (int v = 0; v < TILE_VECTORS; v++) sums[t][v] = U::add_product(sums[t][v], weights[v], x + unit * TOKENS + t);
  }
  for (int t = 0; t < TOKENS; t++)
    for (int v = 0; v < TILE_VECTORS; v++) {
      float *p = c + t * c_stride + v * W;
      store(p, first ? sums[t][v] : add(load(p), sums[t][v]));
    }
}

// panel_block for a number of tokens, 1 .. TOKENS, that is known only when it runs.
template <class U, int TOKENS>
struct PanelBlock {
  template <class... Arguments>
  static void run(int64_t tokens, Arguments &&...arguments) {
    if (tokens == TOKENS)
      panel_block<U, TOKENS>(arguments...);
    else
      PanelBlock<U, TOKENS - 1>::run(tokens, arguments...);
  }
};
template <class U>
struct PanelBlock<U, 0> {
  template <class... Arguments>
  static void run(int64_t, Arguments &&...) {}
};

// Tokens go in blocks of up to TILE_TOKENS, of even sizes: 17 tokens are 9 + 8, not 14 + 3.
inline int64_t token_blocks(int64_t n_tokens) { return (n_tokens + TILE_TOKENS - 1) / TILE_TOKENS; }
inline int64_t first_of_block(int64_t block, int64_t n_tokens) { return n_tokens * block / token_blocks(n_tokens); }

// c[T, O rounded up to PANEL] from T prepared tokens and O rows of weights. panels: room for ceil(O / PANEL) panels.
// x: the blocks of tokens, each [unit][token], `x_units` units. next: the weights of the next call, or nullptr.
template <class T>
void panel_tile(float *c, int64_t c_stride, const T *w, int64_t w_stride, int64_t O, const float *x, int64_t x_units,
                int64_t n_tokens, int64_t K, const T *next, float *panels) {
  typedef Unit<T> U;
  for (int64_t unit = 0; unit < x_units || unit == 0; unit += UNITS<T>) {
    const int64_t n_units = smaller(x_units - unit, UNITS<T>);
    const int64_t k = unit * U::ELEMENTS;
    const int64_t n_k = smaller(K - k, UNITS<T> * U::ELEMENTS);
    const bool last = k + n_k >= K;
    const int64_t n_next = !last ? smaller(K - k - n_k, n_k) : smaller(K, UNITS<T> * U::ELEMENTS);
    Ahead ahead(last ? next : w + k + n_k, O, n_next * sizeof(T), w_stride * sizeof(T));
    pack_panels(panels, w + k, w_stride, O, n_k);
    const int64_t calls = token_blocks(n_tokens) * ((O + PANEL - 1) / PANEL);
    const int64_t lines = n_units ? (ahead.n_lines + calls * n_units - 1) / (calls * n_units) : 0;
    for (int64_t block = 0; block < token_blocks(n_tokens); block++) {
      const int64_t t = first_of_block(block, n_tokens), tokens = first_of_block(block + 1, n_tokens) - t;
      for (int64_t o = 0; o < O; o += PANEL)
        PanelBlock<U, TILE_TOKENS>::run(tokens, c + t * c_stride + o, c_stride, panels + o * UNITS<T>,
                                        x + t * x_units + unit * tokens, n_units, unit == 0, ahead, lines);
    }
  }
}

// How mlp.h uses this file; see ByDot.
template <class T>
struct ByPanel {
  static int64_t units(int64_t K) { return (K + Unit<T>::ELEMENTS - 1) / Unit<T>::ELEMENTS; }
  static int64_t token_bytes(int64_t n_tokens, int64_t K) { return n_tokens * units(K) * sizeof(float); }
  static int64_t n_blocks(int64_t n_tokens) { return token_blocks(n_tokens); }
  static int64_t first_token(int64_t block, int64_t n_tokens) { return first_of_block(block, n_tokens); }
  static void prepare(void *tokens, const T *x, int64_t x_stride, int64_t t, int64_t n, int64_t K) {
    pack_rows(static_cast<float *>(tokens) + t * units(K), n, x, x_stride, n, K);
  }
  static void tile(float *c, int64_t c_stride, const T *w, int64_t w_stride, int64_t O, const void *tokens,
                   int64_t n_tokens, int64_t K, const T *next, float *panels) {
    panel_tile(c, c_stride, w, w_stride, O, static_cast<const float *>(tokens), units(K), n_tokens, K, next, panels);
  }
};

// Many: what serves many tokens. TOKENS_TOGETHER: results have room for a multiple of so many tokens.
#ifndef CNA_AMX
template <class T>
using Many = ByPanel<T>;
constexpr int64_t TOKENS_TOGETHER = 1;
#endif
