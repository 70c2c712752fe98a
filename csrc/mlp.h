// The operations of cna.h, put together from dot.h (few tokens), panel.h or amx.h (many tokens) and act.h.
// Included inside a level's namespace.

constexpr int64_t CHUNK = 256;      // tokens that go through the whole MLP together, so that act stays in cache
constexpr int64_t BLOCK = 32;       // outputs, or neurons, that one task computes
constexpr int64_t ROWS = 64;        // tokens of swiglu or steer_act after which they are summed
constexpr int64_t SMALL = 1 << 15;  // elements that one thread handles faster than several

// The extras for the tokens from t on.
inline cna_extras from_token(cna_extras extras, int64_t t) {
  if (extras.token_weight) extras.token_weight += t * extras.token_weight_stride;
  if (extras.row_circuit) extras.row_circuit += t;
  return extras;
}

// Fills counted with the tokens that some column counts, in order; returns how many they are.
inline int64_t find_counted(int32_t *counted, const cna_extras &extras, int64_t n_tokens) {
  int64_t n = 0;
  for (int64_t t = 0; extras.token_weight && t < n_tokens; t++)
    for (int64_t c = 0; c < extras.n_columns; c++)
      if (extras.token_weight[t * extras.token_weight_stride + c] != 0.0f) {
        counted[n++] = int32_t(t);
        break;
      }
  return n;
}

// The most tokens that dot.h and dot_blocks.h serve, by dtype; see the level's file.
constexpr int64_t most_few(Bf16) { return FEW_BF16; }
constexpr int64_t most_few(Fp16) { return FEW_FP16; }
constexpr int64_t most_few(float) { return FEW_FP32; }
template <class T>
constexpr int64_t most_few_blocks(T) {
  return FEW_BLOCKS;
}
constexpr int64_t most_few_blocks(Bf16) { return FEW_BLOCKS_BF16; }

inline int64_t tile_size(int64_t n_tokens) { return round_up(n_tokens, TOKENS_TOGETHER) * BLOCK; }

// Calls run(parts, t0, n_tokens) for one chunk of tokens after the other. Each call takes its memory from `parts`; a
// call before the first chunk, where parts.at is nullptr, only measures how much memory that is.
template <class Run>
int in_chunks(int64_t all_tokens, const Run &run) {
  Parts parts{nullptr};
  run(parts, int64_t(0), smaller(CHUNK, all_tokens));
  parts.at = workspace(parts.used);
  if (!parts.at) return CNA_ERR_MEMORY;
  for (int64_t t0 = 0; t0 < all_tokens; t0 += CHUNK) {
    parts.used = 0;
    run(parts, t0, smaller(CHUNK, all_tokens - t0));
  }
  return CNA_OK;
}

// The products of one matrix of tokens x [n_tokens, K] with any rows of weights, of T or in blocks.
template <class T>
struct Product {
  int64_t n_tokens, K;
  void *dots = nullptr, *many = nullptr, *blocks = nullptr;  // the tokens as dot.h, Many and dot_blocks.h read them
  bool unpacks = false;                                      // whether rows of blocks are turned into rows of T

  enum Form { DOTS, MANY, BLOCKS };
  Form form_of(const Weights &w) const {
    const bool plain = w.type == type_of(T()), few = n_tokens <= (plain ? most_few(T()) : most_few_blocks(T()));
    return !few ? MANY : plain ? DOTS : BLOCKS;
  }

  // `weights`: all that the tokens will be multiplied with.
  template <class List = std::initializer_list<const Weights *>>
  Product(Parts &parts, int64_t n_tokens, int64_t K, const List &weights) : n_tokens(n_tokens), K(K) {
    bool needed[3] = {};
    for (const Weights *w : weights) {
      needed[form_of(*w)] = true;
      if (form_of(*w) == MANY && w->type != type_of(T())) unpacks = true;
    }
    if (needed[DOTS]) dots = parts.take<char>(ByDot<T>::token_bytes(n_tokens, K));
    if (needed[MANY]) many = parts.take<char>(Many<T>::token_bytes(n_tokens, K));
    if (needed[BLOCKS]) blocks = parts.take<char>(ByBlocks<T>::token_bytes(n_tokens, K));
  }

  // Floats that a thread needs: two tiles of results, the panels of a tile's weights, and its rows turned into T.
  int64_t scratch_size() const {
    return 2 * tile_size(n_tokens) + BLOCK * UNITS<T> + (unpacks ? round_up(BLOCK * K * sizeof(T) / 4, 16) : 0);
  }

  // Bring x into the forms in which these weights read it. each(t) is called once before token t is read.
  template <class Each>
  void prepare(const T *x, int64_t x_stride, int n_threads, std::initializer_list<const Weights *> weights,
               const Each &each) const {
    bool needed[3] = {}, first = true;
    for (const Weights *w : weights) needed[form_of(*w)] = true;
    const auto once = [&](int64_t t) {
      if (first) each(t);
    };
    if (needed[DOTS]) prepare_as<ByDot<T>>(dots, x, x_stride, n_threads, once), first = false;
    if (needed[MANY]) prepare_as<Many<T>>(many, x, x_stride, n_threads, once), first = false;
    if (needed[BLOCKS]) prepare_as<ByBlocks<T>>(blocks, x, x_stride, n_threads, once);
  }

  template <class How, class Each>
  void prepare_as(void *tokens, const T *x, int64_t x_stride, int n_threads, const Each &each) const {
    parallel_for(How::n_blocks(n_tokens), n_tokens * K < SMALL ? 1 : n_threads, [&](int64_t block, int) {
      const int64_t t0 = How::first_token(block, n_tokens), t1 = How::first_token(block + 1, n_tokens);
      for (int64_t t = t0; t < t1; t++) each(t);
      How::prepare(tokens, x + t0 * x_stride, x_stride, t0, t1 - t0, K);
    });
  }

  // Computes c[n_tokens, BLOCK] for O <= BLOCK rows of weights, from `row` on. next: the weights of T whose rows from
  // next_row on are those of the next tile, or nullptr. panels: the scratch behind the tiles of results.
  void tile(float *c, const Weights &w, int64_t row, int64_t O, const Weights *next, int64_t next_row,
            float *panels) const {
    if (w.type == type_of(T())) {
      const T *ahead = next && next->type == w.type ? rows_of(*next, next_row) : nullptr;
      const bool few = form_of(w) == DOTS;
      const auto run = few ? ByDot<T>::tile : Many<T>::tile;
      run(c, BLOCK, rows_of(w, row), w.row_bytes / sizeof(T), O, few ? dots : many, n_tokens, K, ahead, panels);
    } else if (form_of(w) == BLOCKS) {
      ByBlocks<T>::tile(c, BLOCK, w, row, O, blocks, n_tokens, K);
    } else {
      T *rows = reinterpret_cast<T *>(panels + BLOCK * UNITS<T>);
      dequantize_rows(rows, K, w, row, O, K);
      Many<T>::tile(c, BLOCK, rows, K, O, many, n_tokens, K, nullptr, panels);
    }
  }

  static const T *rows_of(const Weights &w, int64_t row) {
    return reinterpret_cast<const T *>(static_cast<const char *>(w.at) + row * w.row_bytes);
  }

  // Block `task` of BLOCK outputs of y[n_tokens, O] = x @ w^T + bias. scratch: a thread's `scratch_size` floats.
  void block_of(T *y, int64_t y_stride, const Weights &w, const T *bias, int64_t O, int64_t task,
                float *scratch) const {
    float *c = scratch, *panels = c + 2 * tile_size(n_tokens);
    const int64_t o0 = task * BLOCK, n = smaller(BLOCK, O - o0);
    tile(c, w, o0, n, o0 + n < O ? &w : nullptr, o0 + n, panels);
    for (int64_t t = 0; t < n_tokens; t++)
      for (int64_t o = 0; o < n; o += W) {
        F32 value = load(c + t * BLOCK + o);
        if (bias) value = add(value, load_some(bias + o0 + o, n - o));
        store_some(y + t * y_stride + o0 + o, value, n - o);
      }
  }

  // All of y.
  void times(T *y, int64_t y_stride, const Weights &w, const T *bias, int64_t O, float *scratch, int64_t scratch_size,
             int n_threads) const {
    parallel_for((O + BLOCK - 1) / BLOCK, n_threads, [&](int64_t task, int thread) {
      block_of(y, y_stride, w, bias, O, task, scratch + thread * scratch_size);
    });
  }
};

// y = (act * scale) @ w_down^T. act [n_tokens, N] is steered in place and then prepared for the product.
template <class T>
void steer_and_project(T *y, int64_t y_stride, T *act, int64_t act_stride, const Product<T> &down,
                       const Weights &w_down, int64_t H, const cna_extras &extras, float *scratch, int64_t scratch_size,
                       int n_threads) {
  down.prepare(act, act_stride, n_threads, {&w_down}, [&](int64_t t) {
    if (extras.row_circuit) steer_row(extras, act + t * act_stride, t, down.K);
  });
  down.times(y, y_stride, w_down, nullptr, H, scratch, scratch_size, n_threads);
}

// act[n_tokens, N] = silu(x @ w_gate^T) * (x @ w_up^T), and its sums.
template <class T>
void gate_up_act(T *act, const T *x, int64_t x_stride, const Product<T> &gate_up, const Weights &w_gate,
                 const Weights &w_up, int64_t N, const cna_extras &extras, int32_t *counted, float *scratch,
                 int64_t scratch_size, int n_threads) {
  const int64_t n_tokens = gate_up.n_tokens, n_counted = find_counted(counted, extras, n_tokens);
  gate_up.prepare(x, x_stride, n_threads, {&w_gate, &w_up}, [](int64_t) {});
  parallel_for((N + BLOCK - 1) / BLOCK, n_threads, [&](int64_t task, int thread) {
    float *gate = scratch + thread * scratch_size, *up = gate + tile_size(n_tokens);
    float *panels = gate + 2 * tile_size(n_tokens);
    const int64_t n0 = task * BLOCK, n = smaller(BLOCK, N - n0);
    fetch_sums(extras, n_counted, n0, n0 + n);
    gate_up.tile(gate, w_gate, n0, n, &w_up, n0, panels);
    gate_up.tile(up, w_up, n0, n, n0 + n < N ? &w_gate : nullptr, n0 + n, panels);
    for (int64_t t = 0; t < n_tokens; t++) swiglu_row(act + t * N + n0, gate + t * BLOCK, up + t * BLOCK, n);
    sum_tokens(extras, act, N, counted, n_counted, n0, n0 + n);
  });
}

template <class T>
int gated_mlp(T *y, const T *x, const Weights &w_gate, const Weights &w_up, const Weights &w_down,
              const cna_extras &all_extras, int64_t all_tokens, int64_t H, int64_t N, int64_t y_stride,
              int64_t x_stride, int n_threads) {
  return in_chunks(all_tokens, [&](Parts &parts, int64_t t0, int64_t n_tokens) {
    const Product<T> gate_up(parts, n_tokens, H, {&w_gate, &w_up}), down(parts, n_tokens, N, {&w_down});
    const int64_t size = larger(gate_up.scratch_size(), down.scratch_size());
    T *act = parts.take<T>(n_tokens * N);
    float *scratch = parts.take<float>(n_threads * size);
    int32_t *counted = parts.take<int32_t>(n_tokens);
    if (!parts.at) return;
    const cna_extras extras = from_token(all_extras, t0);
    gate_up_act(act, x + t0 * x_stride, x_stride, gate_up, w_gate, w_up, N, extras, counted, scratch, size, n_threads);
    steer_and_project(y + t0 * y_stride, y_stride, act, N, down, w_down, H, extras, scratch, size, n_threads);
  });
}

template <class T>
int down_proj(T *y, const T *act, const Weights &w_down, const cna_extras &all_extras, int64_t all_tokens, int64_t H,
              int64_t N, int64_t y_stride, int64_t act_stride, int n_threads) {
  return in_chunks(all_tokens, [&](Parts &parts, int64_t t0, int64_t n_tokens) {
    const Product<T> down(parts, n_tokens, N, {&w_down});
    const int64_t size = down.scratch_size();
    T *steered = parts.take<T>(all_extras.row_circuit ? n_tokens * N : 0);
    float *scratch = parts.take<float>(n_threads * size);
    int32_t *counted = parts.take<int32_t>(n_tokens);
    if (!parts.at) return;
    const cna_extras extras = from_token(all_extras, t0);
    const T *rows = act + t0 * act_stride;
    const int64_t n_counted = find_counted(counted, extras, n_tokens);
    if (n_counted)
      parallel_for((N + BLOCK - 1) / BLOCK, n_tokens * N < SMALL ? 1 : n_threads, [&](int64_t task, int) {
        sum_tokens(extras, rows, act_stride, counted, n_counted, task * BLOCK, smaller(N, (task + 1) * BLOCK));
      });
    if (extras.row_circuit) {
      for (int64_t t = 0; t < n_tokens; t++) std::memcpy(steered + t * N, rows + t * act_stride, N * sizeof(T));
      steer_and_project(y + t0 * y_stride, y_stride, steered, N, down, w_down, H, extras, scratch, size, n_threads);
    } else {
      down.prepare(rows, act_stride, n_threads, {&w_down}, [](int64_t) {});
      down.times(y + t0 * y_stride, y_stride, w_down, nullptr, H, scratch, size, n_threads);
    }
  });
}

template <class T>
int linear(T *y, const T *x, const Weights &w, const T *bias, int64_t all_tokens, int64_t O, int64_t H,
           int64_t y_stride, int64_t x_stride, int n_threads) {
  return in_chunks(all_tokens, [&](Parts &parts, int64_t t0, int64_t n_tokens) {
    const Product<T> product(parts, n_tokens, H, {&w});
    const int64_t size = product.scratch_size();
    float *scratch = parts.take<float>(n_threads * size);
    if (!parts.at) return;
    product.prepare(x + t0 * x_stride, x_stride, n_threads, {&w}, [](int64_t) {});
    product.times(y + t0 * y_stride, y_stride, w, bias, O, scratch, size, n_threads);
  });
}

// Writes act[T, N] row by row, with sums and steering. row(to, t, n0, n) writes neurons n0 up to n0 + n of token t. A
// task owns a range of neurons for all tokens, so that every sum has one writer.
template <class T, class Row>
int write_act(T *act, int64_t act_stride, const cna_extras &extras, int64_t n_tokens, int64_t N, int n_threads,
              const Row &row) {
  const int64_t wanted = round_up(N / (4 * n_threads) + 1, 64), width = wanted < 1024 ? wanted : 1024;
  parallel_for((N + width - 1) / width, n_tokens * N < SMALL ? 1 : n_threads, [&](int64_t task, int) {
    const int64_t n0 = task * width, n = smaller(width, N - n0);
    for (int64_t t0 = 0; t0 < n_tokens; t0 += ROWS) {
      const int64_t rows = smaller(ROWS, n_tokens - t0);
      T *block = act + t0 * act_stride;
      for (int64_t t = 0; t < rows; t++) row(block + t * act_stride + n0, t0 + t, n0, n);
      const cna_extras here = from_token(extras, t0);
      int32_t counted[ROWS];
      const int64_t n_counted = find_counted(counted, here, rows);
      sum_tokens(here, block, act_stride, counted, n_counted, n0, n0 + n);
    }
  });
  if (extras.row_circuit)
    for (int64_t t = 0; t < n_tokens; t++) steer_row(extras, act + t * act_stride, t, N);
  return CNA_OK;
}

template <class T>
int swiglu(T *act, const T *gate, const T *up, const cna_extras &extras, int64_t n_tokens, int64_t N,
           int64_t act_stride, int64_t gate_stride, int64_t up_stride, int n_threads) {
  return write_act(act, act_stride, extras, n_tokens, N, n_threads, [&](T *to, int64_t t, int64_t n0, int64_t n) {
    swiglu_row(to, gate + t * gate_stride + n0, up + t * up_stride + n0, n);
  });
}

template <class T>
int steer_act(T *steered, const T *act, const cna_extras &extras, int64_t n_tokens, int64_t N, int64_t steered_stride,
              int64_t act_stride, int n_threads) {
  return write_act(steered, steered_stride, extras, n_tokens, N, n_threads,
                   [&](T *to, int64_t t, int64_t n0, int64_t n) {
                     if (steered != act) std::memcpy(to, act + t * act_stride + n0, n * sizeof(T));
                   });
}

template <class T>
int dequantize(T *out, const Weights &w, int64_t n_rows, int64_t K, int64_t out_stride, int n_threads) {
  parallel_for((n_rows + BLOCK - 1) / BLOCK, n_rows * K < SMALL ? 1 : n_threads, [&](int64_t task, int) {
    const int64_t row = task * BLOCK;
    dequantize_rows(out + row * out_stride, out_stride, w, row, smaller(BLOCK, n_rows - row), K);
  });
  return CNA_OK;
}
