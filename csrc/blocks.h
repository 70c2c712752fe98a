// Block formats of GGUF: a row of weights is a row of blocks, read as they lie in the file. In each group of a block
//
//   w[k] = scale * q[k] - offset        q: whole numbers of 4 to 8 bits
//
// The layouts are those of ggml (block_q4_0 .. block_q6_K in ggml-common.h). Values are computed in fp32 in the order
// of gguf.quants.dequantize, so that they are the same bits. Blocks have no alignment. Included inside a level's
// namespace.

inline float half_at(const uint8_t *p) {
  Fp16 half;
  std::memcpy(&half, p, sizeof half);
  return widen(half);
}

// q[0:16] from the low halves of 16 bytes, q[16:32] from their high halves.
inline void unpack_nibbles(int8_t *q, const uint8_t *bytes, int zero) {
  for (int i = 0; i < 16; i++) {
    q[i] = int8_t((bytes[i] & 15) - zero);
    q[16 + i] = int8_t((bytes[i] >> 4) - zero);
  }
}

// The same with a fifth bit for each number: bit i of the 32 bits at `fifth` belongs to q[i].
inline void unpack_fives(int8_t *q, const uint8_t *bytes, const uint8_t *fifth, int zero) {
  for (int i = 0; i < 16; i++) {
    q[i] = int8_t(((bytes[i] & 15) | (fifth[i / 8] >> i % 8 & 1) << 4) - zero);
    q[16 + i] = int8_t(((bytes[i] >> 4) | (fifth[2 + i / 8] >> i % 8 & 1) << 4) - zero);
  }
}

// Eight scales and eight minima of 6 bits, in 12 bytes: the low 6 bits of bytes 0 .. 3 and 4 .. 7 are the first four
// scales and minima. The last four have their low 4 bits in bytes 8 .. 11, their high 2 on top of those bytes.
inline void unpack_sixes(uint8_t *scale, uint8_t *minimum, const uint8_t *bytes) {
  for (int i = 0; i < 4; i++) {
    scale[i] = bytes[i] & 63;
    minimum[i] = bytes[4 + i] & 63;
    scale[4 + i] = uint8_t((bytes[8 + i] & 15) | bytes[i] >> 6 << 4);
    minimum[4 + i] = uint8_t(bytes[8 + i] >> 4 | bytes[4 + i] >> 6 << 4);
  }
}

// A format: ELEMENTS of a block in BYTES, in groups of GROUP that have a scale each, and offsets if OFFSETS.
// unpack: q[ELEMENTS], scale[ELEMENTS / GROUP], offset[ELEMENTS / GROUP] of the block at p.

struct Q4_0 {
  static constexpr int TYPE = CNA_Q4_0, ELEMENTS = 32, BYTES = 18, GROUP = 32;
  static constexpr bool OFFSETS = false;
  static void unpack(int8_t *q, float *scale, float *, const uint8_t *p) {
    *scale = half_at(p);
    unpack_nibbles(q, p + 2, 8);
  }
};

struct Q4_1 {
  static constexpr int TYPE = CNA_Q4_1, ELEMENTS = 32, BYTES = 20, GROUP = 32;
  static constexpr bool OFFSETS = true;
  static void unpack(int8_t *q, float *scale, float *offset, const uint8_t *p) {
    *scale = half_at(p);
    *offset = -half_at(p + 2);
    unpack_nibbles(q, p + 4, 0);
  }
};

struct Q5_0 {
  static constexpr int TYPE = CNA_Q5_0, ELEMENTS = 32, BYTES = 22, GROUP = 32;
  static constexpr bool OFFSETS = false;
  static void unpack(int8_t *q, float *scale, float *, const uint8_t *p) {
    *scale = half_at(p);
    unpack_fives(q, p + 6, p + 2, 16);
  }
};

struct Q5_1 {
  static constexpr int TYPE = CNA_Q5_1, ELEMENTS = 32, BYTES = 24, GROUP = 32;
  static constexpr bool OFFSETS = true;
  static void unpack(int8_t *q, float *scale, float *offset, const uint8_t *p) {
    *scale = half_at(p);
    *offset = -half_at(p + 2);
    unpack_fives(q, p + 8, p + 4, 0);
  }
};

struct Q8_0 {
  static constexpr int TYPE = CNA_Q8_0, ELEMENTS = 32, BYTES = 34, GROUP = 32;
  static constexpr bool OFFSETS = false;
  static void unpack(int8_t *q, float *scale, float *, const uint8_t *p) {
    *scale = half_at(p);
    std::memcpy(q, p + 2, 32);
  }
};

// The scales of Q4_K and Q5_K, which begin alike.
inline void unpack_k_scales(float *scale, float *offset, const uint8_t *p) {
  const float d = half_at(p), d_minimum = half_at(p + 2);
  uint8_t scales[8], minima[8];
  unpack_sixes(scales, minima, p + 4);
  for (int g = 0; g < 8; g++) {
    scale[g] = d * float(scales[g]);
    offset[g] = d_minimum * float(minima[g]);
  }
}

struct Q4_K {
  static constexpr int TYPE = CNA_Q4_K, ELEMENTS = 256, BYTES = 144, GROUP = 32;
  static constexpr bool OFFSETS = true;
  static void unpack(int8_t *q, float *scale, float *offset, const uint8_t *p) {
    unpack_k_scales(scale, offset, p);
    for (int c = 0; c < 4; c++)  // 32 bytes hold two groups
      for (int i = 0; i < 32; i++) {
        const uint8_t byte = p[16 + 32 * c + i];
        q[64 * c + i] = int8_t(byte & 15);
        q[64 * c + 32 + i] = int8_t(byte >> 4);
      }
  }
};

struct Q5_K {
  static constexpr int TYPE = CNA_Q5_K, ELEMENTS = 256, BYTES = 176, GROUP = 32;
  static constexpr bool OFFSETS = true;
  static void unpack(int8_t *q, float *scale, float *offset, const uint8_t *p) {
    unpack_k_scales(scale, offset, p);
    for (int c = 0; c < 4; c++)
      for (int i = 0; i < 32; i++) {
        const uint8_t byte = p[48 + 32 * c + i], fifth = p[16 + i];  // bit g of fifth[i]: group g
        q[64 * c + i] = int8_t((byte & 15) | (fifth >> 2 * c & 1) << 4);
        q[64 * c + 32 + i] = int8_t(byte >> 4 | (fifth >> (2 * c + 1) & 1) << 4);
      }
  }
};

struct Q6_K {
  static constexpr int TYPE = CNA_Q6_K, ELEMENTS = 256, BYTES = 210, GROUP = 16;
  static constexpr bool OFFSETS = false;
  static void unpack(int8_t *q, float *scale, float *, const uint8_t *p) {
    const float d = half_at(p + 208);
    for (int g = 0; g < 16; g++) scale[g] = d * float(int8_t(p[192 + g]));
    for (int h = 0; h < 2; h++, q += 128)  // 64 bytes of low halves and 32 of high pairs hold 128 numbers
      for (int i = 0; i < 32; i++) {
        const uint8_t low = p[64 * h + i], next = p[64 * h + 32 + i], high = p[128 + 32 * h + i];
        q[i] = int8_t(((low & 15) | (high & 3) << 4) - 32);
        q[32 + i] = int8_t(((next & 15) | (high >> 2 & 3) << 4) - 32);
        q[64 + i] = int8_t((low >> 4 | (high >> 4 & 3) << 4) - 32);
        q[96 + i] = int8_t((next >> 4 | high >> 6 << 4) - 32);
      }
  }
};

// Calls run(Q()) with the format of a type. `type` is one of the formats above.
template <class Run>
void with_format(int type, const Run &run) {
  switch (type) {
    case CNA_Q4_0: return run(Q4_0());
    case CNA_Q4_1: return run(Q4_1());
    case CNA_Q5_0: return run(Q5_0());
    case CNA_Q5_1: return run(Q5_1());
    case CNA_Q8_0: return run(Q8_0());
    case CNA_Q4_K: return run(Q4_K());
    case CNA_Q5_K: return run(Q5_K());
    case CNA_Q6_K: return run(Q6_K());
  }
}
