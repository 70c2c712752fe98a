// Level "avx512_bf16": AVX-512 with products of bf16 pairs (Cooper Lake, Sapphire Rapids, Zen 4).
#if defined(__x86_64__)

#include "level.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include <immintrin.h>

namespace cna {
namespace avx512_bf16 {

#define CNA_BF16_PAIRS
#include "vec_avx512.h"

// Up to how many tokens dot.h is faster than panel.h: 2 cores of Zen 4, 2026-11-21.
constexpr int64_t FEW_BF16 = 4, FEW_FP16 = 48, FEW_FP32 = 4;

// The same for weights in blocks, dot_blocks.h, in every dtype: 2 cores of Emerald Rapids, 2026-11-27.
constexpr int64_t FEW_BLOCKS_BF16 = 8, FEW_BLOCKS = 8;

#define CNA_BF16_BLOCKS
constexpr const BlockKernels &block_kernels = BLOCKS_AVX512;

#include "level_body.h"

}  // namespace avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif

void (*const BF16_OF_BLOCKS)(Bf16 *out, const uint8_t *blocks, int type, int64_t n) = avx512_bf16::bf16_of_blocks;
extern const Level LEVEL_AVX512_BF16 = {"avx512_bf16", avx512_bf16::ops<Bf16>(), avx512_bf16::ops<Fp16>(),
                                        avx512_bf16::ops<float>()};

}  // namespace cna

#endif
