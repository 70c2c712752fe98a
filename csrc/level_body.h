// The operations of cna.h from the vectors (vec_*.h), the FEW_* constants and the block kernels of a level. Included
// inside its namespace. A level that defines CNA_OWN_BLOCKS has block kernels of its own.
#include "act.h"

#include "dot.h"
#include "panel.h"
#ifdef CNA_OWN_BLOCKS
#include "blocks.h"

#include "dot_blocks.h"
#endif
#ifdef CNA_BF16_BLOCKS
#include "blocks.h"

#include "blocks_avx512.h"

#include "blocks_bf16.h"
#endif
#include "by_blocks.h"
#ifdef CNA_AMX
#include "amx.h"
#endif

#include "mlp.h"

#include "decode.h"
