// Element types and their scalar conversions. bf16 and fp16 are structs around the bit pattern, so that templates can
// tell them apart. Everything here is static: files compiled for different instruction sets share no code.
#pragma once

#include <cstdint>
#include <cstring>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of 16-bit values are taken apart as on little-endian processors"
#endif

namespace cna {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

static inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float widen(float x) { return x; }
static inline float widen(Bf16 x) { return from_bits(uint32_t(x.bits) << 16); }

static inline float widen(Fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return from_bits(sign | 0x7F800000 | (rest & 0x3FF) << 13);  // infinity, NaN
  const float magnitude = from_bits(rest << 13) * from_bits(0x77800000);           // times 2^112: subnormals too
  return from_bits(sign | to_bits(magnitude));
}

// Round to nearest, ties to even.
static inline void narrow(float *out, float x) { *out = x; }

static inline void narrow(Bf16 *out, float x) {
  const uint32_t bits = to_bits(x);
  out->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline void narrow(Fp16 *out, float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000;
  uint32_t bits = to_bits(x) & 0x7FFFFFFF;
  if (bits > 0x7F800000) {
    bits = 0x7E00;  // NaN
  } else if (bits >= 0x477FF000) {
    bits = 0x7C00;  // 65520 and above round to infinity
  } else if (bits < 0x38800000) {
    bits = to_bits(from_bits(bits) + 0.5f) - 0x3F000000;  // subnormal: the addition rounds at 2^-24
  } else {
    bits = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(sign | bits);
}

}  // namespace cna
