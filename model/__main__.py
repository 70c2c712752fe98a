"""``python -m cna_kernels.model`` is ``cna``; so is ``torchrun -m cna_kernels.model``."""

import sys

from .cli import main

sys.exit(main())
