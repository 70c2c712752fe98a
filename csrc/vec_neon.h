// Vectors of 4 floats: NEON on 64-bit Arm. See vec_generic.h for the interface.

typedef float32x4_t F32;
constexpr int W = 4;
constexpr int TILE_TOKENS = 4;  // 16 accumulators: 4 pipes of latency 4. At most W, see pack_rows
constexpr int TILE_VECTORS = 4;

inline F32 set1(float x) { return vdupq_n_f32(x); }
inline F32 zero() { return vdupq_n_f32(0.0f); }
inline F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
inline F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
inline F32 div(F32 a, F32 b) { return vdivq_f32(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
inline F32 least(F32 a, F32 b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline F32 greatest(F32 a, F32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline F32 not_below(F32 x, F32 limit) { return vbslq_f32(vcltq_f32(x, limit), zero(), set1(1.0f)); }
inline float total(F32 a) { return vaddvq_f32(a); }
inline F32 add_to_exponent(F32 a, F32 n_in_low_bits) {
  const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(n_in_low_bits), 23);
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), n));
}

inline F32 load(const float *p) { return vld1q_f32(p); }
inline F32 load_words(const void *p) { return vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)p)); }
inline F32 load(const Bf16 *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)p), 16)); }
inline F32 load(const Fp16 *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p))); }
inline F32 load(const int8_t *p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
inline void store(float *p, F32 a) { vst1q_f32(p, a); }
inline void store(Bf16 *p, F32 a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7FFF)), 16);
  vst1_u16((uint16_t *)p, vmovn_u32(vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7FC0))));
}
inline void store(Fp16 *p, F32 a) { vst1_u16((uint16_t *)p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }

inline F32 low_halves(F32 pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(pairs), 16)); }
inline F32 high_halves(F32 pairs) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(pairs), vdupq_n_u32(0xFFFF0000)));
}

inline void transpose(F32 (&r)[W]) {
  const float32x4_t a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]);
  const float32x4_t c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
  const auto pairs = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
  r[0] = vreinterpretq_f32_f64(vtrn1q_f64(pairs(a), pairs(c)));
  r[1] = vreinterpretq_f32_f64(vtrn1q_f64(pairs(b), pairs(d)));
  r[2] = vreinterpretq_f32_f64(vtrn2q_f64(pairs(a), pairs(c)));
  r[3] = vreinterpretq_f32_f64(vtrn2q_f64(pairs(b), pairs(d)));
}
