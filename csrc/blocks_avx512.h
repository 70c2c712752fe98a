// Products with block weights on AVX-512: the numbers of 4 and 5 bits index a table of the 16 or 32 values that a group
// can have, w = scale * q - offset, computed once for the group. Included inside the namespace of an AVX-512 level.

inline float half(const uint8_t *p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return _cvtsh_ss(bits);
}
inline __m512i wide(const uint8_t *bytes) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes)); }
inline F32 count_from(int first) {  // first, first + 1, .. first + 15
  const __m512i n = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_cvtepi32_ps(_mm512_add_epi32(n, _mm512_set1_epi32(first)));
}
// Sixteen numbers of 4 bits: in the low halves of bytes (SHIFT 0), or the high halves (4).
template <int SHIFT>
inline F32 look_up(__m512i bytes, F32 table) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, SHIFT), table);  // which reads the lowest 4 bits
}
// The same with a fifth bit each.
template <int SHIFT>
inline F32 look_up(__m512i bytes, __mmask16 fifth, F32 low, F32 high) {
  const __m512i four = _mm512_and_si512(_mm512_srli_epi32(bytes, SHIFT), _mm512_set1_epi32(15));
  return _mm512_permutex2var_ps(low, _mm512_mask_or_epi32(four, fifth, four, _mm512_set1_epi32(16)), high);
}

// Eight fp16 numbers, `stride` bytes apart; those from n on are 0.
inline void eight_halves(float *out, const uint8_t *p, int64_t stride, int n) {
  const auto bits_of = [&](int i) {
    int16_t bits = 0;
    if (i < n) std::memcpy(&bits, p + i * stride, sizeof bits);
    return bits;
  };
  const __m128i halves =
      _mm_set_epi16(bits_of(7), bits_of(6), bits_of(5), bits_of(4), bits_of(3), bits_of(2), bits_of(1), bits_of(0));
  _mm256_storeu_ps(out, _mm256_cvtph_ps(halves));
}

// Fast<Q>: how 256 numbers are read, one block or up to eight. start(p, n): the scales of the n groups of 32 numbers
// from the block at p on. weights<G>(w, p): the two vectors of group G.
template <class Q>
struct Simple {
  float scale[8], offset[8];
  void start(const uint8_t *p, int n) {
    eight_halves(scale, p, Q::BYTES, n);
    if (Q::OFFSETS) eight_halves(offset, p + 2, Q::BYTES, n);
    keep(scale);
    keep(offset);
  }
  // Scales are loaded into all lanes from memory: shuffled from a register they would cost the port that numbers need.
  static void keep(float (&array)[8]) { asm("" : "+m"(array)); }
  // scale * (first + n) + offset for n = 0 .. 15
  F32 table(int g, int first) const {
    const F32 values = mul(count_from(first), set1(scale[g]));
    return Q::OFFSETS ? add(values, set1(offset[g])) : values;
  }
};

template <class Q, int FIRST, int AT>
struct Fours : Simple<Q> {
  template <int G>
  void weights(F32 (&w)[2], const uint8_t *p) const {
    const __m512i bytes = wide(p + G * Q::BYTES + AT);
    const F32 table = this->table(G, FIRST);
    w[0] = look_up<0>(bytes, table);
    w[1] = look_up<4>(bytes, table);
  }
};
template <class Q, int FIRST, int AT>
struct Fives : Simple<Q> {
  template <int G>
  void weights(F32 (&w)[2], const uint8_t *p) const {
    uint32_t fifth;
    std::memcpy(&fifth, p + G * Q::BYTES + AT - 4, sizeof fifth);
    const __m512i bytes = wide(p + G * Q::BYTES + AT);
    const F32 low = this->table(G, FIRST), high = this->table(G, FIRST + 16);
    w[0] = look_up<0>(bytes, __mmask16(fifth), low, high);
    w[1] = look_up<4>(bytes, __mmask16(fifth >> 16), low, high);
  }
};

template <class Q>
struct Fast;
template <>
struct Fast<Q4_0> : Fours<Q4_0, -8, 2> {};
template <>
struct Fast<Q4_1> : Fours<Q4_1, 0, 4> {};
template <>
struct Fast<Q5_0> : Fives<Q5_0, -16, 6> {};
template <>
struct Fast<Q5_1> : Fives<Q5_1, 0, 8> {};
template <>
struct Fast<Q8_0> : Simple<Q8_0> {
  template <int G>
  void weights(F32 (&w)[2], const uint8_t *p) const {
    const int8_t *q = reinterpret_cast<const int8_t *>(p + G * Q8_0::BYTES + 2);
    w[0] = mul(load(q), set1(scale[G]));
    w[1] = mul(load(q + 16), set1(scale[G]));
  }
};

template <class Q>
struct K45 : Simple<Q> {
  void start(const uint8_t *p, int) {
    // as unpack_sixes, four bytes at a time
    uint32_t a, b, c;
    std::memcpy(&a, p + 4, 4);
    std::memcpy(&b, p + 8, 4);
    std::memcpy(&c, p + 12, 4);
    const uint32_t six = 0x3F3F3F3F, four = 0x0F0F0F0F, high = 0x30303030;
    times(this->scale, a & six, (c & four) | (a >> 2 & high), half(p));
    times(this->offset, b & six, (c >> 4 & four) | (b >> 2 & high), half(p + 2));
    this->keep(this->scale);
    this->keep(this->offset);
  }
  // out = the eight bytes of two words, times d
  static void times(float *out, uint32_t low, uint32_t high, float d) {
    const __m128i bytes = _mm_cvtsi64_si128(int64_t(uint64_t(high) << 32 | low));
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_set1_ps(d)));
  }
  F32 table(int g, int first) const {
    return _mm512_sub_ps(mul(count_from(first), set1(this->scale[g])), set1(this->offset[g]));
  }
};
template <>
struct Fast<Q4_K> : K45<Q4_K> {
  template <int G>
  void weights(F32 (&w)[2], const uint8_t *p) const {
    const uint8_t *bytes = p + 16 + G / 2 * 32;
    const F32 table = this->table(G, 0);
    w[0] = look_up<G % 2 * 4>(wide(bytes), table);
    w[1] = look_up<G % 2 * 4>(wide(bytes + 16), table);
  }
};
template <>
struct Fast<Q5_K> : K45<Q5_K> {
  template <int G>
  void weights(F32 (&w)[2], const uint8_t *p) const {
    const uint8_t *bytes = p + 48 + G / 2 * 32, *fifth = p + 16;
    const F32 low = this->table(G, 0), high = this->table(G, 16);
    for (int i = 0; i < 2; i++) {
      const __mmask16 bits = _mm512_test_epi32_mask(wide(fifth + 16 * i), _mm512_set1_epi32(1 << G));
      w[i] = look_up<G % 2 * 4>(wide(bytes + 16 * i), bits, low, high);
    }
  }
};

template <>
struct Fast<Q6_K> {
  float scale[16];
  int8_t q[256];
  void start(const uint8_t *p, int) {
    const __m512i whole = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 192)));
    store(scale, mul(_mm512_cvtepi32_ps(whole), set1(half(p + 208))));
    asm("" : "+m"(scale));
    const __m512i low_four = _mm512_set1_epi8(15), two = _mm512_set1_epi8(48), zero = _mm512_set1_epi8(32);
    for (int h = 0; h < 2; h++) {  // 64 bytes of low bits hold 128 numbers; 32 of high bits, used at four shifts
      const __m512i low = _mm512_loadu_si512(p + 64 * h);
      const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(p + 128 + 32 * h)));
      const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
      const __m512i high = _mm512_srlv_epi16(both, shifts);
      const __m512i first = _mm512_and_si512(_mm512_slli_epi16(high, 4), two);
      const __m512i last = _mm512_and_si512(_mm512_srli_epi16(low, 4), low_four);
      // a | b & mask
      const __m512i a = _mm512_ternarylogic_epi32(first, low, low_four, 0xF8);
      const __m512i b = _mm512_ternarylogic_epi32(last, high, two, 0xF8);
      _mm512_storeu_si512(q + 128 * h, _mm512_sub_epi8(a, zero));
      _mm512_storeu_si512(q + 128 * h + 64, _mm512_sub_epi8(b, zero));
    }
    asm("" : "+m"(q));
  }
  template <int G>
  void weights(F32 (&w)[2], const uint8_t *) const {
    w[0] = mul(load(q + 32 * G), set1(scale[2 * G]));
    w[1] = mul(load(q + 32 * G + 16), set1(scale[2 * G + 1]));
  }
};

template <int... G, class Run>
__attribute__((always_inline)) inline void for_each(std::integer_sequence<int, G...>, const Run &run) {
  (run(std::integral_constant<int, G>()), ...);
}

// Calls run(G, w) with the two vectors of each of n groups of 32 numbers, from the block at p on.
template <class Q, class Run>
__attribute__((always_inline)) inline void each_group(const uint8_t *p, int n, const Run &run) {
  Fast<Q> fast;
  fast.start(p, n);
  for_each(std::make_integer_sequence<int, 8>(), [&](auto group) __attribute__((always_inline)) {
    constexpr int G = decltype(group)::value;
    if (Q::ELEMENTS == 32 && G >= n) return;
    F32 w[2];
    fast.template weights<G>(w, p);
    run(G, w);
  });
}
