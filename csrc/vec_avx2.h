// Vectors of 8 floats: AVX2, FMA, F16C. See vec_generic.h for the interface.

typedef __m256 F32;
constexpr int W = 8;
constexpr int TILE_TOKENS = 6;  // 12 accumulators, 2 vectors of weights and a token: 15 of the 16 registers
constexpr int TILE_VECTORS = 2;

inline F32 set1(float x) { return _mm256_set1_ps(x); }
inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 least(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 greatest(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 not_below(F32 x, F32 limit) { return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), set1(1.0f)); }
inline float total(F32 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline F32 add_to_exponent(F32 a, F32 n_in_low_bits) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(n_in_low_bits), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n));
}

inline F32 load(const float *p) { return _mm256_loadu_ps(p); }
inline F32 load_words(const void *p) { return _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline F32 load(const Bf16 *p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F32 load(const Fp16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline F32 load(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
inline void store(float *p, F32 a) { _mm256_storeu_ps(p, a); }
inline void store(Bf16 *p, F32 a) {
  const __m256i bits = _mm256_castps_si256(a),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i top = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF)), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  top = _mm256_blendv_epi8(top, _mm256_set1_epi32(0x7FC0), is_nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  _mm_storeu_si128((__m128i *)p, packed);
}
inline void store(Fp16 *p, F32 a) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }

inline F32 low_halves(F32 pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16)); }
inline F32 high_halves(F32 pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs), _mm256_set1_epi32(-65536)));
}

inline void transpose(F32 (&r)[W]) {
  F32 t[W];
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < W; i += 4) {  // r[i + j]: columns j and 4 + j of rows i .. i + 3
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int j = 0; j < 4; j++) {
    const F32 low = r[j], high = r[4 + j];
    r[j] = _mm256_permute2f128_ps(low, high, 0x20);
    r[4 + j] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}
