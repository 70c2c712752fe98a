// Vectors of 16 floats: AVX-512 F, BW, DQ, VL. See vec_generic.h for the interface.

#define CNA_AVX512
typedef __m512 F32;
constexpr int W = 16;
constexpr int TILE_TOKENS = 14;  // 28 accumulators, 2 vectors of weights and a token: 31 of the 32 registers
constexpr int TILE_VECTORS = 2;

inline F32 set1(float x) { return _mm512_set1_ps(x); }
inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 least(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 greatest(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 not_below(F32 x, F32 limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), set1(1.0f));
}
inline float total(F32 a) { return _mm512_reduce_add_ps(a); }
inline F32 add_to_exponent(F32 a, F32 n_in_low_bits) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(n_in_low_bits), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), n));
}

inline F32 load(const float *p) { return _mm512_loadu_ps(p); }
inline F32 load_words(const void *p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
inline F32 load(const Bf16 *p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F32 load(const Fp16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline F32 load(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
inline void store(float *p, F32 a) { _mm512_storeu_ps(p, a); }
inline void store(Bf16 *p, F32 a) {
  const __m512i bits = _mm512_castps_si512(a),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i top = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF)), 16);
  top = _mm512_mask_mov_epi32(top, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(top));
}
inline void store(Fp16 *p, F32 a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }

inline F32 low_halves(F32 pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
inline F32 high_halves(F32 pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(-65536)));
}

inline void transpose(F32 (&r)[W]) {
  F32 t[W];
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < W; i += 4) {  // r[i + j]: columns j, 4 + j, 8 + j, 12 + j of rows i .. i + 3
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int j = 0; j < 4; j++) {  // then the 4 x 4 blocks of 128 bits
    const F32 even_a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), odd_a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xDD);
    const F32 even_b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const F32 odd_b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xDD);
    r[j] = _mm512_shuffle_f32x4(even_a, even_b, 0x88);
    r[4 + j] = _mm512_shuffle_f32x4(odd_a, odd_b, 0x88);
    r[8 + j] = _mm512_shuffle_f32x4(even_a, even_b, 0xDD);
    r[12 + j] = _mm512_shuffle_f32x4(odd_a, odd_b, 0xDD);
  }
}
