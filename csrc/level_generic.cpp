// Level "generic": plain C++ for any processor.
#include "level.h"

namespace cna {
namespace generic {

#include "vec_generic.h"

// Up to how many tokens dot.h is faster than panel.h; unmeasured beyond 64 tokens.
constexpr int64_t FEW_BF16 = 16, FEW_FP16 = 16, FEW_FP32 = 16;

// The same for weights in blocks, dot_blocks.h; unmeasured.
constexpr int64_t FEW_BLOCKS_BF16 = 8, FEW_BLOCKS = 8;

#define CNA_OWN_BLOCKS
constexpr const BlockKernels &block_kernels = BLOCKS_GENERIC;

#include "level_body.h"

}  // namespace generic

extern const BlockKernels BLOCKS_GENERIC = {generic::tile_of_blocks, generic::numbers_of_blocks};
extern const Level LEVEL_GENERIC = {"generic", generic::ops<Bf16>(), generic::ops<Fp16>(), generic::ops<float>()};

}  // namespace cna
