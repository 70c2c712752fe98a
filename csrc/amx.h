// Products of many tokens on AMX, transposed: c[o, t] = sum_k w[o, k] * x[t, k]. Rows of weights are tiles as they lie
// in memory, 16 rows x 32 values of k; tokens are turned once into tiles of 16 pairs of k x 16 tokens, padded with
// zeros to whole tiles. Every sum is one chain over k: a token's result does not depend on its neighbours. Included
// inside level amx's namespace.
//
// With CNA_AMX_EMULATED the tile instructions are plain loops: tests run this file that way on a machine without AMX.

constexpr int TILE = 16;                   // rows of a tile, and 32-bit words in a row of one
constexpr int64_t TOKENS_TOGETHER = TILE;  // memory for results is rounded up to so many tokens
constexpr int64_t STEP = 2 * TILE;         // values of k in a tile
constexpr int64_t SLICE = 16;              // steps whose weights stay in the first cache while many tokens pass

// Tiles 0 to 3 are sums: 0 and 1 of the first 16 rows of weights, 2 and 3 of the others, for the left and the right 16
// tokens. 4 and 5 are weights, 6 and 7 tokens. Rows past O are not read.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  explicit TileConfig(int64_t O) {
    rows[0] = rows[1] = rows[4] = uint8_t(smaller(O, TILE));
    rows[2] = rows[3] = rows[5] = uint8_t(larger(O - TILE, 1));  // one that is read again where there is none
  }
};

#ifdef CNA_AMX_EMULATED
static thread_local uint8_t emulated_rows[8];
static thread_local float emulated[8][16][16];
inline void emulated_load(int tile, const void *at, int64_t stride) {
  for (int r = 0; r < emulated_rows[tile]; r++)
    std::memcpy(emulated[tile][r], static_cast<const char *>(at) + r * stride, 64);
}
inline void emulated_store(int tile, void *at, int64_t stride) {
  for (int r = 0; r < emulated_rows[tile]; r++)
    std::memcpy(static_cast<char *>(at) + r * stride, emulated[tile][r], 64);
}
inline void emulated_product(int c, int a, int b) {
  for (int m = 0; m < emulated_rows[c]; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        const uint32_t w = to_bits(emulated[a][m][k]), x = to_bits(emulated[b][k][n]);
        emulated[c][m][n] += from_bits(w << 16) * from_bits(x << 16);
        emulated[c][m][n] += from_bits(w & 0xFFFF0000) * from_bits(x & 0xFFFF0000);
      }
}
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) std::memcpy(emulated_rows, (config)->rows, sizeof emulated_rows)
#define _tile_release()
#define _tile_zero(tile) std::memset(emulated[tile], 0, sizeof emulated[tile])
#define _tile_loadd(tile, at, stride) emulated_load(tile, at, stride)
#define _tile_stored(tile, at, stride) emulated_store(tile, at, stride)
#define _tile_dpbf16ps(c, a, b) emulated_product(c, a, b)
#endif

constexpr int64_t TILE_FLOATS = TILE * TILE;
inline int64_t n_steps(int64_t K) { return (K + STEP - 1) / STEP; }

// Prepares n <= 16 tokens: n_steps(K) tiles.
inline void prepare_amx(float *tiles, const Bf16 *x, int64_t x_stride, int64_t n, int64_t K) {
  for (int64_t k = 0; k < K; k += STEP, tiles += TILE_FLOATS) {
    F32 r[W];
    load_rows(r, x + k, x_stride, n, K - k);
    transpose(r);
    for (int i = 0; i < W; i++) store(tiles + i * W, r[i]);
  }
}

// Rows of weights as the kernel reads them: the second 16 rows, the next step, and the next row lie so many bytes
// apart.
struct Rows {
  const void *at;
  int64_t below, step, row;
};

// Adds n steps to the sums: of both tiles of tokens, or of the left one. KEEPS: copies the tiles of weights to `kept`.
template <bool BOTH, bool KEEPS>
void amx_steps(Rows w, const float *left, const float *right, int64_t n, float *kept) {
  const char *top = static_cast<const char *>(w.at), *bottom = top + w.below;
  for (; n > 0; n--, top += w.step, bottom += w.step, left += TILE_FLOATS, right += TILE_FLOATS) {
    _tile_loadd(4, top, w.row);
    _tile_loadd(6, left, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, bottom, w.row);
    _tile_dpbf16ps(2, 5, 6);
    if (BOTH) {
      _tile_loadd(7, right, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (KEEPS) {
      _tile_stored(4, kept, 64);
      _tile_stored(5, kept + TILE_FLOATS, 64);
      kept += 2 * TILE_FLOATS;
    }
  }
}

inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
inline void load_sums(const float *sums, bool both) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(2, sums + TILE_FLOATS, 64);
  if (both) _tile_loadd(1, sums + 2 * TILE_FLOATS, 64);
  if (both) _tile_loadd(3, sums + 3 * TILE_FLOATS, 64);
}
inline void store_sums(float *sums, bool both) {
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + TILE_FLOATS, 64);
  if (both) _tile_stored(1, sums + 2 * TILE_FLOATS, 64);
  if (both) _tile_stored(3, sums + 3 * TILE_FLOATS, 64);
}
// c[t, o] = the sums. Behind fewer than 32 rows of weights it holds anything.
inline void write_sums(float *c, int64_t c_stride, bool both) {
  alignas(64) float sums[4 * TILE_FLOATS] = {};
  store_sums(sums, both);
  for (int tile = 0; tile < (both ? 4 : 2); tile++) {
    F32 r[W];
    for (int i = 0; i < W; i++) r[i] = load(sums + tile * TILE_FLOATS + i * TILE);
    transpose(r);
    for (int i = 0; i < W; i++) store(c + (tile / 2 * TILE + i) * c_stride + tile % 2 * TILE, r[i]);
  }
}

// As panel_tile; c and x have room for a multiple of 16 tokens, and c_stride is 32. Up to 32 tokens pass over the rows
// as they lie in memory. More pass over one slice of k after the other: the first 32 copy its tiles of weights to
// `kept`, for the others. Rows 4 KiB apart would push each other out of the first cache.
//
// Nothing is fetched ahead: up to 16 tokens the tile loads themselves reach a plain read's bandwidth, 25 GB/s. The next
// rows of a matrix are often another thread's, and fetching them costs up to 1.7 times the time (bf16, O 4096, K 2048,
// 2 cores of Emerald Rapids, 2026-11-28).
inline void amx_tile(float *c, int64_t c_stride, const Bf16 *w, int64_t w_stride, int64_t O, const float *x,
                     int64_t n_tokens, int64_t K, float *kept) {
  const TileConfig config(O);
  _tile_loadconfig(&config);
  const bool many = n_tokens > 2 * TILE, one_tile = O <= TILE;
  const int64_t all = n_steps(K), whole = K / STEP, row = w_stride * sizeof *w;
  Bf16 rest[2 * TILE][STEP] = {};  // the last step of rows that end within it
  for (int64_t o = 0; whole < all && o < O; o++)
    std::memcpy(rest[o], w + o * w_stride + whole * STEP, (K - whole * STEP) * sizeof *w);
  const Rows tiles = {kept, one_tile ? 0 : 1024, 2048, 64};
  const Rows rest_rows = {rest, one_tile ? 0 : TILE * int64_t(sizeof *rest), 0, sizeof *rest};

  int64_t s = 0;
  do {
    const int64_t n = many ? smaller(all - s, SLICE) : all, n_whole = smaller(whole - s, n),
                  done = n_whole * TILE_FLOATS;
    const Rows rows = {w + s * STEP, one_tile ? 0 : TILE * row, 64, row};
    for (int64_t t = 0; t < n_tokens; t += 2 * TILE) {
      const bool both = n_tokens - t > TILE;
      float *own = c + t * c_stride;  // holds the sums between two slices, as they lie in the tiles
      const float *left = x + (t / TILE * all + s) * TILE_FLOATS, *right = both ? left + all * TILE_FLOATS : left;
      s > 0 ? load_sums(own, both) : clear_sums();
      if (t > 0) {
        (both ? amx_steps<true, false> : amx_steps<false, false>)(tiles, left, right, n, nullptr);
      } else {
        const auto run = many ? amx_steps<true, true> : both ? amx_steps<true, false> : amx_steps<false, false>;
        run(rows, left, right, n_whole, kept);
        run(rest_rows, left + done, right + done, n - n_whole, kept + 2 * done);
      }
      s + n < all ? store_sums(own, both) : write_sums(own, c_stride, both);
    }
    s += n;
  } while (s < all);
  _tile_release();
}

// How mlp.h uses this file; see ByDot.
struct ByTiles {
  static int64_t token_bytes(int64_t n_tokens, int64_t K) {
    return n_blocks(n_tokens) * n_steps(K) * TILE_FLOATS * sizeof(float);
  }
  static int64_t n_blocks(int64_t n_tokens) { return (n_tokens + TILE - 1) / TILE; }
  static int64_t first_token(int64_t block, int64_t n_tokens) { return smaller(block * TILE, n_tokens); }
  static void prepare(void *tokens, const Bf16 *x, int64_t x_stride, int64_t t, int64_t n, int64_t K) {
    prepare_amx(static_cast<float *>(tokens) + t / TILE * n_steps(K) * TILE_FLOATS, x, x_stride, n, K);
  }
  static void tile(float *c, int64_t c_stride, const Bf16 *w, int64_t w_stride, int64_t O, const void *tokens,
                   int64_t n_tokens, int64_t K, const Bf16 *, float *kept) {
    static_assert(2 * SLICE * TILE_FLOATS <= 2 * TILE * UNITS<Bf16>, "the scratch of panels has room for a slice");
    amx_tile(c, c_stride, w, w_stride, O, static_cast<const float *>(tokens), n_tokens, K, kept);
  }
};

template <class T>
struct ManyOf {
  typedef ByPanel<T> type;
};
template <>
struct ManyOf<Bf16> {
  typedef ByTiles type;
};
template <class T>
using Many = typename ManyOf<T>::type;
