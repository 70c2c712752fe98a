// Vectors of 4 floats in plain C++ (with the vector extension of gcc and clang): any processor.
// This file shows the interface that every vec_*.h gives to the kernels. Included inside a level's namespace.

typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));
constexpr int W = 4;            // floats in a vector
constexpr int TILE_TOKENS = 4;  // accumulators of the panel kernel: TILE_TOKENS x TILE_VECTORS of the 16 registers
constexpr int TILE_VECTORS = 2;

inline F32 set1(float x) { return F32{x, x, x, x}; }
inline F32 zero() { return set1(0.0f); }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 div(F32 a, F32 b) { return a / b; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 least(F32 a, F32 b) { return a < b ? a : b; }                            // b where one is NaN
inline F32 greatest(F32 a, F32 b) { return a > b ? a : b; }                         // b where one is NaN
inline F32 not_below(F32 x, F32 limit) { return x < limit ? zero() : set1(1.0f); }  // 0 where x < limit, else 1
inline float total(F32 a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline F32 add_to_exponent(F32 a, F32 n_in_low_bits) { return (F32)((I32)a + ((I32)n_in_low_bits << 23)); }

inline F32 load(const float *p) {
  F32 a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline F32 load_words(const void *p) {  // W 32-bit words at any address
  F32 a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline F32 load(const Bf16 *p) { return F32{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
inline F32 load(const Fp16 *p) { return F32{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
inline F32 load(const int8_t *p) { return F32{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline void store(float *p, F32 a) { std::memcpy(p, &a, sizeof a); }
inline void store(Bf16 *p, F32 a) {
  for (int i = 0; i < W; i++) narrow(p + i, a[i]);
}
inline void store(Fp16 *p, F32 a) {
  for (int i = 0; i < W; i++) narrow(p + i, a[i]);
}

// Pairs of bf16, one in each 32-bit lane: those in the low halves, those in the high halves.
inline F32 low_halves(F32 pairs) { return (F32)((I32)pairs << 16); }
inline F32 high_halves(F32 pairs) { return (F32)((I32)pairs & (I32{-1, -1, -1, -1} << 16)); }

inline void transpose(F32 (&r)[W]) {
  const F32 a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < W; i++) r[i] = F32{a[i], b[i], c[i], d[i]};
}
