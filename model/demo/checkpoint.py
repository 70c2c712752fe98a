"""Where the bundled checkpoints lie: in a checkout beside this file, else in the distribution cna-kernels-demo."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cna_kernels.errors import InputError

from ..packages import missing

NAMES = ("instruct", "base")


def demo_checkpoint(name: str = "instruct") -> Path:
    """Return the directory of the bundled ``instruct`` or ``base`` checkpoint."""
    if name not in NAMES:
        raise InputError("demo checkpoint", f"expected one of {', '.join(NAMES)}, got {name!r}")
    here = Path(__file__).parent / "checkpoints" / name
    if here.is_dir():
        return here
    if reason := missing("cna-kernels-demo"):
        raise InputError("cna-kernels-demo", reason)
    spec = find_spec("cna_kernels_demo")
    if spec is None or spec.origin is None:
        raise InputError("cna-kernels-demo", "not installed: the folder cna_kernels_demo on the path is no package")
    return Path(spec.origin).parent / name
