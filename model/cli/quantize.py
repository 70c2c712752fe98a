"""What `cna quantize` does."""

from __future__ import annotations

from ..checkpoint.formats import require_checkpoint
from ..checkpoint.quantize import quantize
from .arguments import directory_of
from .console import stdout


def run_quantize(args):
    model = directory_of(args.model)
    require_checkpoint(model)
    written = quantize(model, args.to, args.output)
    size = f"{written.size / 1e6:.1f} MB, {written.bits_per_weight:.2f} bits per weight"
    stdout().print(f"wrote {args.output}: {size}", markup=False, soft_wrap=True)
