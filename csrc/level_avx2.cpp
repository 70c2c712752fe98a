// Level "avx2": AVX2, FMA and F16C (x86-64 since 2013).
#if defined(__x86_64__)

#include "level.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

namespace cna {
namespace avx2 {

#include "vec_avx2.h"

// Up to how many tokens dot.h is faster than panel.h: 2 cores of Zen 4, 2026-11-21.
constexpr int64_t FEW_BF16 = 8, FEW_FP16 = 8, FEW_FP32 = 8;

// The same for weights in blocks, dot_blocks.h, in every dtype: 2 cores of Emerald Rapids, 2026-11-27.
constexpr int64_t FEW_BLOCKS_BF16 = 8, FEW_BLOCKS = 8;

#define CNA_OWN_BLOCKS
constexpr const BlockKernels &block_kernels = BLOCKS_AVX2;

#include "level_body.h"

}  // namespace avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif

extern const BlockKernels BLOCKS_AVX2 = {avx2::tile_of_blocks, avx2::numbers_of_blocks};
extern const Level LEVEL_AVX2 = {"avx2", avx2::ops<Bf16>(), avx2::ops<Fp16>(), avx2::ops<float>()};

}  // namespace cna

#endif
