"""The compiled library of ``csrc``, by ctypes: signatures, versions, and statuses as exceptions.

Nothing is loaded on import. ``csrc/cna.h`` is the contract; SIGNATURES repeats it for ctypes.
"""

from __future__ import annotations

import functools
import os
import sys
from ctypes import CDLL, Structure, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

from .. import plans

ABI_VERSION = 3
PATH = Path(__file__).with_name("libcna.dylib" if sys.platform == "darwin" else "libcna.so")
BUILD = "with a C++ compiler installed, run 'pip install .' (or 'pip install -e .') in the project's directory again"
if sys.platform == "win32":
    BUILD = "it is not built on Windows"

MEMORY = 10  # CNA_ERR_MEMORY


class Extras(Structure):
    """``cna_extras``: the optional arguments."""

    _fields_ = (
        ("version", c_int64),
        *((name, c_void_p) for name in ("token_weight", "act_sum", "act_sumsq")),
        *((name, c_int64) for name in ("n_columns", "token_weight_stride", "act_sum_stride", "act_sumsq_stride")),
        *((name, c_void_p) for name in ("row_circuit", "offsets", "index", "value")),
        *((name, c_int64) for name in ("n_circuits", "n_entries", "offsets_stride")),
        *((name, c_void_p) for name in ("act_sum_fp64", "act_sumsq_fp64")),
    )


class Weight(Structure):
    """``cna_weight``."""

    _fields_ = (("at", c_void_p), ("type", c_int64), ("row_bytes", c_int64))


class Layer(Structure):
    """``cna_layer``."""

    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((f"w_{name}", Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("b_q", "b_k", "b_v", "b_o", "keys", "values")),
        ("window", c_int64),
    )


class Decoder(Structure):
    """``cna_decoder``."""

    _fields_ = (
        ("version", c_int64),
        *((name, c_void_p) for name in ("layers", "norm")),
        *((name, c_int64) for name in ("n_layers", "H", "N", "n_heads", "n_kv_heads", "D")),
        *((name, c_int64) for name in ("length", "cache_row", "cache_head")),
        ("eps", c_double),
    )


# op -> (number of arrays and weights before the extras, whether extras follow, number of sizes and strides). n_threads
# comes last.
_OPS = {
    "gated_mlp": (5, True, 7),
    "swiglu": (3, True, 5),
    "steer_act": (2, True, 4),
    "down_proj": (3, True, 6),
    "linear": (4, False, 6),
    "gated_mlp_typed": (5, True, 5),
    "down_proj_typed": (3, True, 5),
    "linear_typed": (4, False, 5),
    "dequantize": (2, False, 3),
    "decode": (6, True, 4),
}

SIGNATURES = {
    "cna_abi_version": (c_int, ()),
    "cna_has_openmp": (c_int, ()),
    "cna_status_text": (c_char_p, (c_int,)),
    "cna_isa_levels": (c_char_p, ()),
    "cna_isa": (c_char_p, ()),
    "cna_use_isa": (c_int, (c_char_p,)),
} | {
    f"cna_{op}_{dtype}": (
        c_int,
        (*[c_void_p] * n_arrays, *[c_void_p] * has_extras, *[c_int64] * n_sizes, c_int),
    )
    for op, (n_arrays, has_extras, n_sizes) in _OPS.items()
    for dtype in ("bf16", "fp16", "fp32")
}


class LibraryError(Exception):
    """The library cannot be used here; the message says why and what to do."""


def open_library(path: Path) -> CDLL:
    """Load the library at ``path``, with argument types.

    Raises:
        LibraryError: the library is missing, cannot be loaded, or has another ABI version.
    """
    if not path.exists():
        raise LibraryError(f"needs the compiled library {path}, which is missing: {BUILD}")
    try:
        library = CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"cannot load the compiled library ({error}): {BUILD}") from None
    try:
        version = library.cna_abi_version()
    except AttributeError:
        raise LibraryError(f"{path} is not the compiled library: {BUILD}") from None
    if version != ABI_VERSION:
        raise LibraryError(f"{path} has ABI version {version}, expected {ABI_VERSION}: {BUILD}")
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def load() -> CDLL:
    """Return the library that was compiled with the package. Raises LibraryError."""
    return open_library(PATH)


def missing() -> str | None:
    """Return why the CPU backend cannot run, or None if it can."""
    try:
        library = load()
    except LibraryError as error:
        return str(error)
    if not library.cna_isa():
        asked = os.environ.get("CNA_CPU_ISA")
        return f"cannot use CNA_CPU_ISA={asked!r}: this CPU has {', '.join(levels())}"
    return None


def isa() -> str:
    """The instruction-set level in use."""
    name: bytes = load().cna_isa()
    return name.decode()


def levels() -> list[str]:
    """The instruction-set levels that this CPU has, best last."""
    names: bytes = load().cna_isa_levels()
    return names.decode().split()


def use_isa(name: str | None) -> None:
    """Use an instruction-set level for all calls from now on; None goes back to the default. Raises ValueError."""
    if load().cna_use_isa(None if name is None else name.encode()):
        raise ValueError(f"isa: expected one of {', '.join(levels())}, got {name!r}")
    plans.forget()


def check(function: str, status: int) -> None:
    """Raise the exception that a status stands for; none for CNA_OK."""
    if status == 0:
        return
    text = f"{function}: {load().cna_status_text(status).decode()}"
    raise MemoryError(text) if status == MEMORY else ValueError(text)
