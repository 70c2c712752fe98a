// Which instruction-set levels this processor has, and which one serves the calls.
#pragma once

#include "level.h"

namespace cna {

// The level in use; nullptr where CNA_CPU_ISA names one that is unknown or missing.
const Level *current_level();

}  // namespace cna
