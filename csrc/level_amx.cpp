// Level "amx": AVX-512 with products of bf16 pairs, and tiles (Sapphire Rapids and later).
#include "level.h"
#ifdef CNA_COMPILES_AMX

#if defined(__clang__)
#pragma clang attribute push(                                                                                 \
    __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include <immintrin.h>

namespace cna {
namespace amx {

#define CNA_BF16_PAIRS
#define CNA_AMX
#include "vec_avx512.h"

// Up to how many tokens dot.h is faster than amx.h (bf16) or panel.h: bf16 on 2 cores of Emerald Rapids, 2026-11-28.
constexpr int64_t FEW_BF16 = 1, FEW_FP16 = 48, FEW_FP32 = 4;

// The same for weights in blocks, dot_blocks.h, with tokens in bf16 and in other dtypes: 2 cores of Emerald Rapids,
// 2026-11-28.
constexpr int64_t FEW_BLOCKS_BF16 = 2, FEW_BLOCKS = 8;

constexpr const BlockKernels &block_kernels = BLOCKS_AVX512;

#include "level_body.h"

}  // namespace amx

#if defined(__clang__)
#pragma clang attribute pop
#endif

extern const Level LEVEL_AMX = {"amx", amx::ops<Bf16>(), amx::ops<Fp16>(), amx::ops<float>()};

}  // namespace cna

#endif
