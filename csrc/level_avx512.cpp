// Level "avx512": AVX-512 F, BW, DQ and VL (x86-64 servers since 2017).
#if defined(__x86_64__)

#include "level.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include <immintrin.h>

namespace cna {
namespace avx512 {

#include "vec_avx512.h"

// Up to how many tokens dot.h is faster than panel.h: widening bf16 into panels costs more than reading tokens again
// (2 cores of Zen 4, 2026-11-21).
constexpr int64_t FEW_BF16 = 48, FEW_FP16 = 48, FEW_FP32 = 4;

// The same for weights in blocks, dot_blocks.h, in every dtype: 2 cores of Emerald Rapids, 2026-11-27.
constexpr int64_t FEW_BLOCKS_BF16 = 8, FEW_BLOCKS = 8;

#define CNA_OWN_BLOCKS
constexpr const BlockKernels &block_kernels = BLOCKS_AVX512;

#include "level_body.h"

}  // namespace avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif

extern const BlockKernels BLOCKS_AVX512 = {avx512::tile_of_blocks, avx512::numbers_of_blocks};
extern const Level LEVEL_AVX512 = {"avx512", avx512::ops<Bf16>(), avx512::ops<Fp16>(), avx512::ops<float>()};

}  // namespace cna

#endif
