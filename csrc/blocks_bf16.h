// Rows of blocks rounded to bf16, 32 numbers at a time: those of 4 and 5 bits index a table of the bf16 values that a
// group can have. The rounding instruction takes subnormal fp32 numbers for 0; those of blocks are 0 or far larger.
// Included after blocks_avx512.h, inside the namespace of a level that has products of bf16 pairs.

inline __m256i sixteen(const uint8_t *bytes) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)bytes)); }
inline __m512i thirty_two(const uint8_t *bytes) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
}
// Sixteen bytes and, behind them, the same bytes shifted to their high halves.
inline __m512i halves_of(const uint8_t *bytes) {
  const __m256i low = sixteen(bytes);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1);
}
inline __m512i rounded(F32 low, F32 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
// A look-up reads the lowest 5 bits: a table of 16 values holds them twice.
inline __m512i twice(F32 values) { return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values)); }
inline __m512i with_fifth(__m512i bytes, __mmask32 fifth) {
  const __m512i four = _mm512_and_si512(bytes, _mm512_set1_epi16(15));
  return _mm512_mask_add_epi16(four, fifth, four, _mm512_set1_epi16(16));
}

// numbers<G>(p): group G of the block at p, after start; see Fast.
template <class Q>
struct Rounded : Fast<Q> {
  template <int G>
  __m512i numbers(const uint8_t *p) const {
    F32 w[2];
    this->template weights<G>(w, p);
    return rounded(w[0], w[1]);
  }
};
template <class Q, int FIRST, int AT>
struct RoundedFours : Fast<Q> {
  template <int G>
  __m512i numbers(const uint8_t *p) const {
    return _mm512_permutexvar_epi16(halves_of(p + G * Q::BYTES + AT), twice(this->table(G, FIRST)));
  }
};
template <class Q, int FIRST, int AT>
struct RoundedFives : Fast<Q> {
  template <int G>
  __m512i numbers(const uint8_t *p) const {
    uint32_t fifth;
    std::memcpy(&fifth, p + G * Q::BYTES + AT - 4, sizeof fifth);
    const __m512i table = rounded(this->table(G, FIRST), this->table(G, FIRST + 16));
    return _mm512_permutexvar_epi16(with_fifth(halves_of(p + G * Q::BYTES + AT), fifth), table);
  }
};
template <>
struct Rounded<Q4_0> : RoundedFours<Q4_0, -8, 2> {};
template <>
struct Rounded<Q4_1> : RoundedFours<Q4_1, 0, 4> {};
template <>
struct Rounded<Q5_0> : RoundedFives<Q5_0, -16, 6> {};
template <>
struct Rounded<Q5_1> : RoundedFives<Q5_1, 0, 8> {};
template <>
struct Rounded<Q4_K> : Fast<Q4_K> {
  template <int G>
  __m512i numbers(const uint8_t *p) const {
    const __m512i bytes = thirty_two(p + 16 + G / 2 * 32);
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, G % 2 * 4), twice(this->table(G, 0)));
  }
};
template <>
struct Rounded<Q5_K> : Fast<Q5_K> {
  template <int G>
  __m512i numbers(const uint8_t *p) const {
    const __m512i bytes = _mm512_srli_epi16(thirty_two(p + 48 + G / 2 * 32), G % 2 * 4);
    const __mmask32 fifth = _mm512_test_epi16_mask(thirty_two(p + 16), _mm512_set1_epi16(1 << G));
    return _mm512_permutexvar_epi16(with_fifth(bytes, fifth), rounded(this->table(G, 0), this->table(G, 16)));
  }
};

// BF16_OF_BLOCKS.
inline void bf16_of_blocks(Bf16 *out, const uint8_t *blocks, int type, int64_t n) {
  with_format(type, [&](auto format) {
    typedef decltype(format) Q;
    constexpr int BYTES = 256 / Q::ELEMENTS * Q::BYTES;
    for (int64_t k = 0; k < n; k += 256, blocks += BYTES) {
      for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(blocks + FETCH_AHEAD + i);
      const int groups = n - k < 256 ? int(n - k) / 32 : 8;
      Rounded<Q> block;
      block.start(blocks, groups);
      for_each(std::make_integer_sequence<int, 8>(), [&](auto group) __attribute__((always_inline)) {
        constexpr int G = decltype(group)::value;
        if (G < groups) _mm512_storeu_si512(out + k + 32 * G, block.template numbers<G>(blocks));
      });
    }
  });
}
