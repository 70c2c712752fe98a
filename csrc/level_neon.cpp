// Level "neon": 64-bit Arm, where NEON is always present.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "level.h"

namespace cna {
namespace neon {

#include "vec_neon.h"

// Up to how many tokens dot.h is faster than panel.h; unmeasured.
constexpr int64_t FEW_BF16 = 8, FEW_FP16 = 8, FEW_FP32 = 8;

// The same for weights in blocks, dot_blocks.h; unmeasured.
constexpr int64_t FEW_BLOCKS_BF16 = 8, FEW_BLOCKS = 8;

#define CNA_OWN_BLOCKS
constexpr const BlockKernels &block_kernels = BLOCKS_NEON;

#include "level_body.h"

}  // namespace neon

extern const BlockKernels BLOCKS_NEON = {neon::tile_of_blocks, neon::numbers_of_blocks};
extern const Level LEVEL_NEON = {"neon", neon::ops<Bf16>(), neon::ops<Fp16>(), neon::ops<float>()};

}  // namespace cna

#endif
