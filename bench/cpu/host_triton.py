"""The host's time for a call of the Triton backend, measured without a GPU on a driver that does nothing.

``bench_host.py`` runs this file in its own process, with that driver (``stub_cuda.c``) in place of libcuda. This file
prints rows as JSON. Weights are small, since nothing reads them. Kernels, plans and launches are those of an H100.
"""

import ctypes
import json

import torch
import triton
from triton.backends.nvidia import driver as nvidia

from aot import Target
from cna_kernels import backends, make_scale, ops
from cna_kernels.extras import Extras
from cna_kernels.triton import ops as triton_ops
from cna_kernels.triton.down_decode import down_gemv
from cna_kernels.triton.gate_up_decode import gate_up_decode
from interleave import compare

CALLS, ROUNDS = 500, 15


class Stub(Target):
    """What Triton asks of a driver before a launch."""

    def __init__(self):
        super().__init__(90)
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

    def allocate_default_profile_scratch(self, *_):
        return None


def many(call):
    def run():
        for _ in range(CALLS):
            call()

    return run


def main():
    triton.runtime.driver.set_active(Stub())
    launches = ctypes.CDLL("libcuda.so.1").stub_launches
    launches.restype = ctypes.c_uint64
    backends.missing = lambda name, device: None  # allow this backend although tensors lie in host memory
    T, H, N, C, K = 1, 256, 1024, 2, 64
    bf16 = torch.bfloat16
    inputs = torch.randn(T, H).to(bf16), torch.randn(2 * N, H).to(bf16), None, torch.randn(H, N).to(bf16)
    scale, rows = make_scale([{3: 0.0}] * K, N), torch.zeros(T, dtype=torch.int32)
    token_weight, act_sum = torch.ones(T, C), torch.zeros(C, N)
    both = Extras(token_weight, act_sum, None, *scale, rows)
    x, w_gate_up, _, w_down = inputs

    def anew(extras):
        return down_gemv(gate_up_decode(x, w_gate_up, **extras.keywords()), w_down, dependent=True)

    for feature, extras in (("plain", Extras()), ("sums and steering", both)):
        pair = triton_ops.prepare("gated_mlp", inputs, extras)
        given = extras.keywords()
        op = lambda given=given: ops.gated_mlp(x, w_gate_up, w_down, backend="triton", **given)  # noqa: E731
        below = lambda pair=pair, extras=extras: pair(*inputs, *extras)  # noqa: E731
        for name, call in (("the launches of the decode pair", below), ("ops.gated_mlp", op)):
            call()
            before = launches()
            call()
            assert launches() == before + 2, "the decode pair is two launches"
            result = compare(many(call), many(lambda extras=extras: anew(extras)), rounds=ROUNDS)
            result["ours"], result["theirs"] = (result[who] / CALLS * 1e6 for who in ("ours", "theirs"))
            print(json.dumps(dict(call=name, feature=feature, **result)), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
