"""Where the bundled checkpoints lie."""

from __future__ import annotations

from pathlib import Path

from cna_kernels.checks import InputError

NAMES = ("instruct", "base")


def demo_checkpoint(name: str = "instruct") -> Path:
    """Return the directory of the bundled ``instruct`` or ``base`` checkpoint."""
    if name not in NAMES:
        raise InputError("demo checkpoint", f"expected one of {', '.join(NAMES)}, got {name!r}")
    return Path(__file__).parent / "checkpoints" / name
