"""``python -m cna_kernels.model`` runs the command ``cna``; so does ``torchrun -m cna_kernels.model``."""

import sys

from .cli import main

sys.exit(main())
