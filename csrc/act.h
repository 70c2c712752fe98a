// silu(gate) * up, the sums of its result, and steering. Included inside a level's namespace.

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// exp(x) for x in [-87, 88]: Cody-Waite reduction and the polynomial of Cephes' expf (Moshier), relative error 2^-23.
inline F32 exp_in_range(F32 x) {
  const F32 shifter = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const F32 shifted = fma(x, set1(1.44269504f), shifter);
  const F32 n = add(shifted, set1(-12582912.0f));
  const F32 r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  F32 p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return add_to_exponent(add(fma(p, mul(r, r), r), set1(1.0f)), shifted);
}

// x / (1 + exp(-x)); 0 where x < -88, NaN where x is NaN or -infinity, like torch.
inline F32 silu(F32 x) {
  const F32 negated = least(set1(88.0f), greatest(set1(-87.0f), mul(x, set1(-1.0f))));
  const F32 y = div(x, add(set1(1.0f), exp_in_range(negated)));
  return mul(y, not_below(x, set1(-88.0f)));
}

template <class T>
inline F32 load_some(const T *p, int64_t n) {
  if (n >= W) return load(p);
  T some[W] = {};
  std::memcpy(some, p, n * sizeof(T));
  return load(some);
}

template <class T>
inline void store_some(T *p, F32 a, int64_t n) {
  if (n >= W) return store(p, a);
  T some[W];
  store(some, a);
  std::memcpy(p, some, n * sizeof(T));
}

// act[0 : n] = silu(gate) * up, rounded.
template <class T, class G>
void swiglu_row(T *act, const G *gate, const G *up, int64_t n) {
  for (int64_t i = 0; i < n; i += W)
    store_some(act + i, mul(silu(load_some(gate + i, n - i)), load_some(up + i, n - i)), n - i);
}

// act_sum[C, N] += token_weight^T @ act (act_sumsq likewise) over the rows of this call, for COLUMNS columns from
// `column` on and neurons n0 : n1. One writer for each element; tokens in order; a token whose weights are all 0 is not
// read.
template <class T, int COLUMNS>
void sum_columns(const cna_extras &e, const T *act, int64_t act_stride, const int32_t *counted, int64_t n_counted,
                 int64_t column, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += W) {
    const int64_t some = n1 - n;
    F32 sums[COLUMNS], squares[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) sums[c] = squares[c] = zero();
    for (int64_t i = 0; i < n_counted; i++) {
      const F32 a = load_some(act + counted[i] * act_stride + n, some);
      const float *token_weight = e.token_weight + counted[i] * e.token_weight_stride + column;
      const F32 square = mul(a, a);
      for (int c = 0; c < COLUMNS; c++) {
        const F32 w = set1(token_weight[c]);
        sums[c] = fma(w, a, sums[c]);
        if (e.act_sumsq) squares[c] = fma(w, square, squares[c]);
      }
    }
    for (int c = 0; c < COLUMNS; c++) {
      if (e.act_sum) {
        float *p = e.act_sum + (column + c) * e.act_sum_stride + n;
        store_some(p, add(load_some(p, some), sums[c]), some);
      }
      if (e.act_sumsq) {
        float *p = e.act_sumsq + (column + c) * e.act_sumsq_stride + n;
        store_some(p, add(load_some(p, some), squares[c]), some);
      }
    }
  }
}

// Half a vector's floats, and as many doubles: a vector's bytes.
typedef float HalfF32 __attribute__((vector_size(W * 2)));
typedef double F64 __attribute__((vector_size(W * 4)));

// The same in fp64, where products of two fp32 numbers are exact.
template <class T, int COLUMNS>
void sum_columns_fp64(const cna_extras &e, const T *act, int64_t act_stride, const int32_t *counted, int64_t n_counted,
                      int64_t column, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += W) {
    const int64_t some = smaller(W, n1 - n);
    F64 sums[COLUMNS][2] = {}, squares[COLUMNS][2] = {};
    for (int64_t i = 0; i < n_counted; i++) {
      float floats[W];
      store(floats, load_some(act + counted[i] * act_stride + n, some));
      const float *token_weight = e.token_weight + counted[i] * e.token_weight_stride + column;
      for (int half = 0; half < 2; half++) {
        HalfF32 some_floats;
        std::memcpy(&some_floats, floats + half * (W / 2), sizeof some_floats);
        const F64 a = __builtin_convertvector(some_floats, F64);
        for (int c = 0; c < COLUMNS; c++) {
          const F64 weighted = a * double(token_weight[c]);
          sums[c][half] += weighted;
          squares[c][half] += weighted * a;
        }
      }
    }
    for (int c = 0; c < COLUMNS; c++)
      for (int64_t lane = 0; lane < some; lane++) {
        const int64_t half = lane / (W / 2), place = lane % (W / 2);
        if (e.act_sum_fp64) e.act_sum_fp64[(column + c) * e.act_sum_stride + n + lane] += sums[c][half][place];
        if (e.act_sumsq_fp64) e.act_sumsq_fp64[(column + c) * e.act_sumsq_stride + n + lane] += squares[c][half][place];
      }
  }
}

// Asks for the memory of sums that are added to soon.
inline void fetch_sums(const cna_extras &e, int64_t n_counted, int64_t n0, int64_t n1) {
  const auto fetch = [&](const auto *sums, int64_t stride) {
    for (int64_t column = 0; sums && column < e.n_columns; column++)
      for (int64_t n = n0; n < n1; n += 64 / int64_t(sizeof *sums)) __builtin_prefetch(sums + column * stride + n, 1);
  };
  if (n_counted == 0) return;
  fetch(e.act_sum, e.act_sum_stride);
  fetch(e.act_sumsq, e.act_sumsq_stride);
  fetch(e.act_sum_fp64, e.act_sum_stride);
  fetch(e.act_sumsq_fp64, e.act_sumsq_stride);
}

template <class T>
void sum_tokens(const cna_extras &e, const T *act, int64_t act_stride, const int32_t *counted, int64_t n_counted,
                int64_t n0, int64_t n1) {
  if (n_counted == 0) return;
  if (e.act_sum_fp64 || e.act_sumsq_fp64) {
    int64_t column = 0;
    for (; column + 4 <= e.n_columns; column += 4)
      sum_columns_fp64<T, 4>(e, act, act_stride, counted, n_counted, column, n0, n1);
    for (; column + 2 <= e.n_columns; column += 2)
      sum_columns_fp64<T, 2>(e, act, act_stride, counted, n_counted, column, n0, n1);
    for (; column < e.n_columns; column++)
      sum_columns_fp64<T, 1>(e, act, act_stride, counted, n_counted, column, n0, n1);
  }
  if (!e.act_sum && !e.act_sumsq) return;
  int64_t column = 0;
  for (; column + 4 <= e.n_columns; column += 4)
    sum_columns<T, 4>(e, act, act_stride, counted, n_counted, column, n0, n1);
  for (; column + 2 <= e.n_columns; column += 2)
    sum_columns<T, 2>(e, act, act_stride, counted, n_counted, column, n0, n1);
  for (; column < e.n_columns; column++) sum_columns<T, 1>(e, act, act_stride, counted, n_counted, column, n0, n1);
}

// One row of act, scaled in place by its circuit; the product is rounded again.
template <class T>
void steer_row(const cna_extras &e, T *act, int64_t token, int64_t N) {
  const int64_t circuit = e.row_circuit[token];
  if (circuit < 0 || circuit >= e.n_circuits) return;
  const int32_t *offsets = e.offsets + circuit * e.offsets_stride;
  for (int64_t entry = offsets[0]; entry < offsets[(N + 1023) / 1024]; entry++) {
    T *a = act + e.index[entry];
    narrow(a, e.value[entry] == 0.0f ? 0.0f : widen(*a) * e.value[entry]);
  }
}
