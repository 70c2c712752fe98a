// The operations of cna.h from the vectors (vec_*.h) and the FEW_* constants of a level. Included inside its namespace.
#include "act.h"

#include "dot.h"
#include "panel.h"
#include "blocks.h"
#include "dot_blocks.h"
#ifdef CNA_AMX
#include "amx.h"
#endif

#include "mlp.h"

#include "decode.h"
