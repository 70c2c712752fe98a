"""Arithmetic that the kernels share on the device: rounding, products, silu.

All arithmetic is fp32: bf16 and fp16 are widened right after the load and rounded once before the store.
Offsets of tokens are int64: ``t * stride`` passes 2**31 at 150,000 tokens of a 14,336-neuron model.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

# In the interpreter numpy stands in for the GPU: its fp32 -> bf16 cast drops bits and its bf16 dot is wrong.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with an fp32 accumulator; exact products of bf16 and fp16, true fp32 for fp32."""
    if _INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def silu_mul(gate, up, dtype: tl.constexpr):
    """silu(gate) * up in fp32, rounded once to dtype: this is act."""
    gate = gate.to(tl.float32)
    below = 1.0 + tl.exp2(gate * -1.4426950408889634)  # 1 + exp(-gate)
    if _INTERPRETED:
        silu = gate / below
    else:
        silu = libdevice.fast_dividef(gate, below)  # 2 ulp; below is at least 1, so the range reduction of / is idle
    return rounded(silu * up.to(tl.float32), dtype)


@triton.jit
def scaled(act, multiplier, dtype: tl.constexpr):
    """act * multiplier, rounded again; a multiplier of 0 gives exactly 0 whatever act holds."""
    return rounded(tl.where(multiplier == 0.0, 0.0, act.to(tl.float32) * multiplier), dtype)
