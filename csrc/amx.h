// Products of many tokens on AMX: tiles of 16 tokens x 16 outputs, each step 32 values of k. The panels are those of
// panel.h; tokens are rows of bf16 pairs, padded with zeros to whole steps. Included inside level amx's namespace.
//
// With CNA_AMX_EMULATED the tile instructions are plain loops: tests run this file that way on a machine without AMX.

#ifdef CNA_AMX_EMULATED
struct EmulatedTile {
  float rows[16][16];
};
static thread_local EmulatedTile emulated[8];
inline void emulated_load(int tile, const void *at, int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(emulated[tile].rows[r], static_cast<const char *>(at) + r * stride, 64);
}
inline void emulated_store(int tile, void *at, int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(static_cast<char *>(at) + r * stride, emulated[tile].rows[r], 64);
}
inline void emulated_product(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        const uint32_t x = to_bits(emulated[a].rows[m][k]), w = to_bits(emulated[b].rows[k][n]);
        emulated[c].rows[m][n] += from_bits(x << 16) * from_bits(w << 16);
        emulated[c].rows[m][n] += from_bits(x & 0xFFFF0000) * from_bits(w & 0xFFFF0000);
      }
}
#define _tile_loadconfig(config) (void)(config)
#define _tile_release()
#define _tile_zero(tile) emulated[tile] = EmulatedTile()
#define _tile_loadd(tile, at, stride) emulated_load(tile, at, stride)
#define _tile_stored(tile, at, stride) emulated_store(tile, at, stride)
#define _tile_dpbf16ps(c, a, b) emulated_product(c, a, b)
#endif

constexpr int TILE = 16;                       // rows of a tile, and 32-bit words in a row of one
constexpr int64_t TOKENS_TOGETHER = 2 * TILE;  // tokens multiplied together: memory is rounded up to this

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline int64_t amx_units(int64_t K) { return round_up((K + 1) / 2, TILE); }

// Prepares one token: amx_units(K) pairs of bf16.
inline void prepare_amx(float *out, const Bf16 *x, int64_t K) {
  std::memset(out + K / 2, 0, (amx_units(K) - K / 2) * sizeof *out);
  if (K) std::memcpy(out, x, K * sizeof *x);
}

// As panel_tile; c and x have room for a multiple of TOKENS_TOGETHER tokens.
inline void amx_tile(float *c, int64_t c_stride, const Bf16 *w, int64_t w_stride, int64_t O, const float *x,
                     int64_t x_stride, int64_t n_tokens, int64_t K, const Bf16 *next, float *panels) {
  static const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t unit = 0; unit < x_stride || unit == 0; unit += UNITS<Bf16>) {
    const int64_t n_units = smaller(x_stride - unit, UNITS<Bf16>), k = 2 * unit, n_k = smaller(K - k, 2 * UNITS<Bf16>);
    const bool last = k + n_k >= K;
    const int64_t n_next = last ? smaller(K, 2 * UNITS<Bf16>) : smaller(K - k - n_k, n_k);
    Ahead ahead(last ? next : w + k + n_k, O, n_next * sizeof *w, w_stride * sizeof *w);
    pack_panels(panels, w + k, w_stride, O, n_k);
    for (int64_t o = 0; o < O; o += PANEL)
      for (int64_t u = (n_k + 1) / 2; u < n_units; u++)
        std::memset(panels + o * UNITS<Bf16> + u * PANEL, 0, PANEL * sizeof *panels);
    const int64_t steps =
        (n_tokens + TOKENS_TOGETHER - 1) / TOKENS_TOGETHER * ((O + PANEL - 1) / PANEL) * (n_units / TILE);
    const int64_t lines = steps ? (ahead.n_lines + steps - 1) / steps : 0;
    for (int64_t t = 0; t < n_tokens; t += TOKENS_TOGETHER)
      for (int64_t o = 0; o < O; o += PANEL) {
        float *top = c + t * c_stride + o, *bottom = top + TILE * c_stride;
        const float *x_top = x + t * x_stride + unit, *x_bottom = x_top + TILE * x_stride;
        const float *panel = panels + o * UNITS<Bf16>;
        const int64_t c_bytes = c_stride * sizeof *c, x_bytes = x_stride * sizeof *x, w_bytes = PANEL * sizeof *panel;
        if (unit == 0) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          _tile_loadd(0, top, c_bytes);
          _tile_loadd(1, top + TILE, c_bytes);
          _tile_loadd(2, bottom, c_bytes);
          _tile_loadd(3, bottom + TILE, c_bytes);
        }
        for (int64_t u = 0; u < n_units; u += TILE) {
          ahead.fetch(lines);
          _tile_loadd(4, x_top + u, x_bytes);
          _tile_loadd(5, x_bottom + u, x_bytes);
          _tile_loadd(6, panel + u * PANEL, w_bytes);
          _tile_loadd(7, panel + u * PANEL + TILE, w_bytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, top, c_bytes);
        _tile_stored(1, top + TILE, c_bytes);
        _tile_stored(2, bottom, c_bytes);
        _tile_stored(3, bottom + TILE, c_bytes);
      }
  }
  _tile_release();
}

// How mlp.h uses this file; see ByDot.
struct ByTiles {
  static int64_t token_bytes(int64_t n_tokens, int64_t K) {
    return round_up(n_tokens, TOKENS_TOGETHER) * amx_units(K) * sizeof(float);
  }
  static int64_t n_blocks(int64_t n_tokens) { return n_tokens; }
  static int64_t first_token(int64_t block, int64_t) { return block; }
  static void prepare(void *tokens, const Bf16 *x, int64_t, int64_t t, int64_t, int64_t K) {
    prepare_amx(static_cast<float *>(tokens) + t * amx_units(K), x, K);
  }
  static void tile(float *c, int64_t c_stride, const Bf16 *w, int64_t w_stride, int64_t O, const void *tokens,
                   int64_t n_tokens, int64_t K, const Bf16 *next, float *panels) {
    amx_tile(c, c_stride, w, w_stride, O, static_cast<const float *>(tokens), amx_units(K), n_tokens, K, next, panels);
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
