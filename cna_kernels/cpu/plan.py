"""Whether ``csrc`` or PyTorch's own products serve a call: a pure function of level, T and dtype.

Whether a call sums or scales does not enter the choice: rows that no circuit touches must come out bit for bit as in a
call without both. ``cna doctor`` prints the rule, and ``CNA_PLAN=gated_mlp=torch,linear=csrc`` overrides it for an op.
"""

from __future__ import annotations

import math

import torch

from .. import plans
from ..plans import Plan
from . import library

OPS = ("gated_mlp", "down_proj", "linear")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# (level, dtype) -> the time of csrc as a share of PyTorch's at the same level, `make bench`.
SHARE = {
    ("amx", torch.bfloat16): "0.6 to 1.05",
    ("amx", torch.float16): "0.5 to 1.1",
    ("amx", torch.float32): "0.75 to 1.1",
    ("avx512_bf16", torch.bfloat16): "0.5 to 1.0",
    ("avx512_bf16", torch.float16): "0.2 to 1.1",
    ("avx512_bf16", torch.float32): "0.3 to 0.8",
    ("avx512", torch.bfloat16): "0.2 to 1.0",
    ("avx512", torch.float16): "0.2 to 1.1",
    ("avx512", torch.float32): "0.3 to 0.8",
}
MEASURED = "1 to 256 tokens, 2 cores of Zen 4, 2026-11-21"
MEASURED_AMX = "1 to 256 tokens, 2 cores of Emerald Rapids, 2026-11-28"


def few_blocks(level: str, dtype: torch.dtype) -> int:
    """Up to how many tokens csrc multiplies straight with GGUF's blocks, which it turns into ``dtype`` for more.

    No other plan serves these weights. The rule is that of csrc/level_*.cpp.
    """
    return 2 if level == "amx" and dtype == torch.bfloat16 else 8


# (level, dtype) -> the first and the last number of tokens for which PyTorch's products are used, and why.
TORCH = {("generic", dtype): (5, math.inf, "no vector instructions in the generic level of csrc") for dtype in DTYPES}


def default(level: str, dtype: torch.dtype, n_tokens: int) -> Plan:
    """The plan for a call where nothing overrides it."""
    first, last, reason = TORCH.get((level, dtype), (math.inf, math.inf, ""))
    if first <= n_tokens <= last:
        return Plan("torch", reason)
    share = SHARE.get((level, dtype))
    if share is None:
        return Plan("csrc", "each weight is read once; against PyTorch unmeasured at this level")
    return Plan("csrc", f"{share} of PyTorch's time; {MEASURED_AMX if level == 'amx' else MEASURED}")


def choose(op: str, n_tokens: int, dtype: torch.dtype) -> Plan:
    """The plan for a call: CNA_PLAN if it names one for the op, else the default. Raises InputError."""
    name = plans.override(op)
    if name in ("csrc", "torch"):
        return Plan(name, "CNA_PLAN")
    return default(library.isa(), dtype, n_tokens)


def by_tokens(op: str, dtype: torch.dtype, longest: int = 4096) -> list[tuple[int, Plan]]:
    """(first T, plan) of each range of T = 1 .. longest on which one plan serves calls."""
    ranges: list[tuple[int, Plan]] = []
    for n_tokens in range(1, longest + 1):
        plan = choose(op, n_tokens, dtype)
        if not ranges or ranges[-1][1] != plan:
            ranges.append((n_tokens, plan))
    return ranges
