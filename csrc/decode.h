// One token of every sequence through all layers of a Llama or Qwen: what lies around the MLP, in the order and with
// the roundings of the PyTorch forward (model/transformer.py). Included inside a level's namespace.
//
//   normed = T(T(x * rsqrt(mean(x^2) + eps)) * weight)        in fp32, rounded to T where T() stands; fp32: once
//   rotated[i] = T(T(a[i] * cos[i]) -+ a[i +- D/2] * sin[i])  the halves of a head are the coordinates
//   attended = softmax(q k^T / sqrt(D)) v                     in fp32, rounded once; heads share keys in groups
//   x += attended @ w_o^T + b_o;  x += the MLP of the norm    rounded after each product and each addition
//
// Every number has one writer, and no sum depends on the number of threads.

template <class T>
void rms_norm_row(T *out, const T *x, const T *weight, int64_t n, float eps) {
  F32 squares = zero();
  for (int64_t i = 0; i < n; i += W) {
    const F32 a = load_some(x + i, n - i);
    squares = fma(a, a, squares);
  }
  const F32 factor = set1(1.0f / __builtin_sqrtf(total(squares) / float(n) + eps));
  for (int64_t i = 0; i < n; i += W) {
    T some[W];
    store(some, mul(load_some(x + i, n - i), factor));
    store_some(out + i, mul(load(some), load_some(weight + i, n - i)), n - i);
  }
}

// Rows of `n` heads of D numbers each, at any stride.
template <class T>
void rotate_heads(T *x, int64_t n_heads, int64_t D, const T *cos, const T *sin) {
  const int64_t half = D / 2;
  for (int64_t head = 0; head < n_heads; head++, x += D)
    for (int64_t i = 0; i < half; i++) {
      const float a = widen(x[i]), b = widen(x[half + i]);
      T first, second;
      narrow(&first, a * widen(cos[i]));
      narrow(&second, b * widen(cos[half + i]));
      narrow(x + i, widen(first) - b * widen(sin[i]));
      narrow(x + half + i, widen(second) + a * widen(sin[half + i]));
    }
}

// out[n_queries, D] = the attention of queries [n_queries, D] that share the keys and values [n_keys, D]. scores: room
// for n_queries rows of n_keys rounded up to W.
template <class T>
void attend(T *out, const T *queries, int64_t n_queries, const T *keys, const T *values, int64_t n_keys, int64_t D,
            float *scores) {
  const int64_t width = round_up(n_keys, W);
  const float scale = 1.0f / __builtin_sqrtf(float(D));
  for (int64_t j = 0; j < n_keys; j++)
    for (int64_t query = 0; query < n_queries; query++) {
      F32 sum = zero();
      for (int64_t d = 0; d < D; d += W)
        sum = fma(load_some(queries + query * D + d, D - d), load_some(keys + j * D + d, D - d), sum);
      scores[query * width + j] = total(sum) * scale;
    }
  for (int64_t query = 0; query < n_queries; query++) {
    float *row = scores + query * width, largest = row[0], all = 0;
    for (int64_t j = 1; j < n_keys; j++) largest = row[j] > largest || row[j] != row[j] ? row[j] : largest;
    for (int64_t j = n_keys; j < width; j++) row[j] = largest - 200.0f;
    for (int64_t j = 0; j < width; j += W)
      store(row + j, exp_in_range(greatest(set1(-87.0f), add(load(row + j), set1(-largest)))));
    for (int64_t j = 0; j < n_keys; j++) all += row[j];
    for (int64_t d = 0; d < D; d += W) {
      F32 sum = zero();
      for (int64_t j = 0; j < n_keys; j++) sum = fma(set1(row[j]), load_some(values + j * D + d, D - d), sum);
      store_some(out + query * D + d, mul(sum, set1(1.0f / all)), D - d);
    }
  }
}

// A product of a step: y [n_tokens, O] = x @ w^T + bias.
template <class T>
struct Projection {
  T *y;
  Weights w;
  const T *bias;
  int64_t O;
};

// Several products of the same tokens in one parallel loop.
template <class T>
void project(const Product<T> &tokens, std::initializer_list<Projection<T>> all, float *scratch, int64_t scratch_size,
             int n_threads) {
  int64_t n_tasks = 0;
  for (const Projection<T> &each : all) n_tasks += (each.O + BLOCK - 1) / BLOCK;
  parallel_for(n_tasks, n_threads, [&](int64_t task, int thread) {
    for (const Projection<T> &each : all) {
      const int64_t n = (each.O + BLOCK - 1) / BLOCK;
      if (task < n)
        return tokens.block_of(each.y, each.O, each.w, each.bias, each.O, task, scratch + thread * scratch_size);
      task -= n;
    }
  });
}

template <class T>
void add_rows(T *x, const T *y, int64_t n) {
  for (int64_t i = 0; i < n; i += W) store_some(x + i, add(load_some(x + i, n - i), load_some(y + i, n - i)), n - i);
}

template <class T>
int decode(T *hidden, const T *x, const Decoder &decoder, const int64_t *position, const T *cos, const T *sin,
           const cna_extras *extras, int64_t all_tokens, int64_t hidden_stride, int64_t x_stride,
           int64_t rotation_stride, int n_threads) {
  const int64_t H = decoder.H, N = decoder.N, D = decoder.D, n_heads = decoder.n_heads, n_kv = decoder.n_kv_heads;
  const int64_t group = n_heads / n_kv, n_q = n_heads * D, n_k = n_kv * D;
  const float eps = float(decoder.eps);
  return in_chunks(all_tokens, [&](Parts &parts, int64_t t0, int64_t n_tokens) {
    T *stream = parts.take<T>(n_tokens * H), *normed = parts.take<T>(n_tokens * H), *y = parts.take<T>(n_tokens * H);
    T *q = parts.take<T>(n_tokens * n_q), *k = parts.take<T>(n_tokens * n_k), *v = parts.take<T>(n_tokens * n_k);
    T *attended = parts.take<T>(n_tokens * n_q), *act = parts.take<T>(n_tokens * N);
    const Product<T> of_stream(parts, n_tokens, H, decoder.of_stream), of_heads(parts, n_tokens, n_q, decoder.of_heads);
    const Product<T> of_act(parts, n_tokens, N, decoder.of_act);
    const int64_t size = larger(of_stream.scratch_size(), larger(of_heads.scratch_size(), of_act.scratch_size()));
    float *scratch = parts.take<float>(n_threads * size);
    int64_t longest = 0;
    for (int64_t t = 0; t < n_tokens; t++) longest = larger(longest, position[t0 + t] + 1);
    const int64_t room = group * round_up(parts.at ? longest : decoder.length, W);
    float *scores = parts.take<float>(n_threads * room);
    int32_t *counted = parts.take<int32_t>(n_tokens);
    if (!parts.at) return;

    const auto each_token = [&](const auto &run) {
      parallel_for(n_tokens, n_tokens * H < SMALL ? 1 : n_threads, [&](int64_t t, int) { run(t); });
    };
    for (int64_t t = 0; t < n_tokens; t++) std::memcpy(stream + t * H, x + (t0 + t) * x_stride, H * sizeof(T));
    for (int64_t number = 0; number < decoder.n_layers; number++) {
      const Layer &layer = decoder.layers[number];
      const cna_extras own = extras ? from_token(extras[number], t0) : cna_extras();
      const auto norm = [&](const void *weight) {
        each_token(
            [&](int64_t t) { rms_norm_row(normed + t * H, stream + t * H, static_cast<const T *>(weight), H, eps); });
      };
      const auto bias = [](const void *at) { return static_cast<const T *>(at); };
      T *const keys = static_cast<T *>(layer.keys), *const values = static_cast<T *>(layer.values);

      norm(layer.input_norm);
      of_stream.prepare(normed, H, n_threads, {&layer.w_q, &layer.w_k, &layer.w_v}, [](int64_t) {});
      project<T>(of_stream,
                 {{q, layer.w_q, bias(layer.b_q), n_q},
                  {k, layer.w_k, bias(layer.b_k), n_k},
                  {v, layer.w_v, bias(layer.b_v), n_k}},
                 scratch, size, n_threads);
      each_token([&](int64_t t) {
        T *own_q = q + t * n_q, *own_k = k + t * n_k;
        const T *cosine = cos + (t0 + t) * rotation_stride, *sine = sin + (t0 + t) * rotation_stride;
        for (int64_t head = 0; layer.q_norm && head < n_heads; head++)
          rms_norm_row(own_q + head * D, own_q + head * D, static_cast<const T *>(layer.q_norm), D, eps);
        for (int64_t head = 0; layer.k_norm && head < n_kv; head++)
          rms_norm_row(own_k + head * D, own_k + head * D, static_cast<const T *>(layer.k_norm), D, eps);
        rotate_heads(own_q, n_heads, D, cosine, sine);
        rotate_heads(own_k, n_kv, D, cosine, sine);
        for (int64_t head = 0; head < n_kv; head++) {
          const int64_t place = (t0 + t) * decoder.cache_row + head * decoder.cache_head + position[t0 + t] * D;
          std::memcpy(keys + place, own_k + head * D, D * sizeof(T));
          std::memcpy(values + place, v + t * n_k + head * D, D * sizeof(T));
        }
      });
      parallel_for(n_tokens * n_kv, n_threads, [&](int64_t task, int thread) {
        const int64_t t = task / n_kv, head = task % n_kv, n_all = position[t0 + t] + 1;
        const int64_t n_keys = layer.window > 0 ? smaller(n_all, layer.window) : n_all;
        const int64_t first = (t0 + t) * decoder.cache_row + head * decoder.cache_head + (n_all - n_keys) * D;
        attend(attended + t * n_q + head * group * D, q + t * n_q + head * group * D, group, keys + first,
               values + first, n_keys, D, scores + thread * room);
      });
      of_heads.prepare(attended, n_q, n_threads, {&layer.w_o}, [](int64_t) {});
      project<T>(of_heads, {{y, layer.w_o, bias(layer.b_o), H}}, scratch, size, n_threads);
      each_token([&](int64_t t) { add_rows(stream + t * H, y + t * H, H); });

      norm(layer.post_norm);
      gate_up_act(act, normed, H, of_stream, layer.w_gate, layer.w_up, N, own, counted, scratch, size, n_threads);
      steer_and_project(y, H, act, N, of_act, layer.w_down, H, own, scratch, size, n_threads);
      each_token([&](int64_t t) { add_rows(stream + t * H, y + t * H, H); });
    }
    each_token([&](int64_t t) {
      rms_norm_row(hidden + (t0 + t) * hidden_stride, stream + t * H, static_cast<const T *>(decoder.norm), H, eps);
    });
  });
}

template <class T>
constexpr Ops<T> ops() {
  return {gated_mlp<T>, swiglu<T>, steer_act<T>, down_proj<T>, linear<T>, dequantize<T>, decode<T>};
}
