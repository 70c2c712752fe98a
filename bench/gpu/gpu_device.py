"""The device that ``gpu.py`` measures: random data, plans, ceilings, and the least work of a row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import gpu_jobs
from cna_kernels import make_scale, ops
from cna_kernels.plans import use as use_plans
from cna_kernels.triton import cost
from cna_kernels.triton import plan as plans
from gpu_timing import Times, brief, measure
from shapes import MODELS

TINY = (64, 96)  # (H, N) of every model in a dry run
TINY_TOKENS = 66  # the largest T of a dry run: just enough for the plans for many tokens

# Bytes/s of a copy and FLOP/s of a bf16 product, both measured with PyTorch on such a card.
KNOWN = {"H100": (3.0e12, 790e12), "H200": (cost.H200.bytes_per_s, cost.H200.flop_per_s)}
CLOCK = 1.98e9  # Hz of an H100 or H200 under load


class Layer(NamedTuple):
    w_gate_up: Tensor  # [2N, H]
    w_down: Tensor  # [H, N]
    act_sum: Tensor  # [2, N]


class Work(NamedTuple):
    """The least bytes that must be moved, and FLOP computed. Sums and steering add 0.2% or less, and are left out."""

    bytes: float
    flop: float


def mlp_work(T, N, H):
    return Work(2 * (3 * N * H + 2 * T * H), 6 * T * N * H)


def down_work(T, N, H):
    return Work(2 * (N * H + T * (N + H)), 2 * T * N * H)


def elementwise_work(T, N):
    return Work(6 * T * N, 0)


def device_of(name: str, ceilings: dict, n_multiprocessors: int = 132) -> tuple[cost.Device, str]:
    """The device for predictions, from the ceilings measured in this run; and a note on rates that were assumed."""
    known = KNOWN["H200" if "H200" in name else "H100"]
    assumed = []
    if not ceilings.get("read"):
        assumed.append(f"memory {known[0] / 1e12:.1f} TB/s")
    if not ceilings.get("bf16 matmul"):
        assumed.append(f"matrix {known[1] / 1e12:.0f} TFLOP/s")
    rates = ceilings.get("read") or known[0], ceilings.get("bf16 matmul") or known[1]
    return cost.Device(name, *rates, n_multiprocessors * 4 * CLOCK), "not measured, assumed: " + ", ".join(assumed)


def make_call(op, T, N, H, arch, n_sm=132, dtype=torch.bfloat16):
    """A plan's Call with aligned rows."""
    given = dict(op=op, T=T, N=N, H=H, dtype=dtype, arch=arch, tma=True, n_sm=n_sm)
    return plans.Call(**{name: value for name, value in given.items() if name in plans.Call._fields})


def catalogue(arch=90, n_sm=132) -> dict:
    """``op/model/T`` -> the default plan and the other plans that can serve, for the shapes of all windows."""
    found = {}
    for model in gpu_jobs.MODELS:
        H, N = MODELS[model]
        for op, tokens in gpu_jobs.TOKENS.items():
            for T in tokens:
                call = make_call(op, T, N, H, arch, n_sm)
                default = plans.default(call).name
                others = [name for name in plans.PLANS[op] if name != default and plans.can_serve(call, name)]
                found[f"{op}/{model}/{T}"] = dict(default=default, candidates=others)
    return found


class Bench:
    """The device, its data and its clock.

    mode: "time" measures; "once" only runs everything once, which leaves every kernel in Triton's cache; "dry" is a
    CPU with Triton's interpreter, tiny shapes, and one call by the wall clock.
    """

    def __init__(self, mode: str, ceilings: dict, once: bool = False):
        self.mode, self.ceilings, self.once = mode, dict(ceilings), once
        self.device = torch.device("cpu" if mode == "dry" else "cuda")
        self.arch, self.n_sm, self.name = 90, 132, "CPU, interpreted"
        if mode != "dry":
            facts = torch.cuda.get_device_properties(0)
            self.arch, self.n_sm, self.name = 10 * facts.major + facts.minor, facts.multi_processor_count, facts.name
        self.generator = torch.Generator(self.device).manual_seed(0)
        self._layers = (None, [])
        self.kept = {}  # expensive objects that a job keeps for the next job

    @property
    def target(self) -> cost.Device:
        return device_of(self.name, self.ceilings, self.n_sm)[0]

    def shape(self, model) -> tuple[int, int]:
        """(H, N)"""
        return TINY if self.mode == "dry" else MODELS[model]

    def tokens(self, T: int) -> int:
        return min(T, TINY_TOKENS) if self.mode == "dry" else T

    def synchronize(self):
        """Wait for the device. Raises if an earlier kernel crashed, after which this process cannot use the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget(self):
        """Free the memory of earlier jobs."""
        self._layers = (None, [])
        self.kept.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def random(self, *shape, deviation=1.0, dtype=torch.bfloat16) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        return x.normal_(0, deviation, generator=self.generator)

    def layers(self, model, T=1) -> list[Layer]:
        """Weight sets to rotate through: 4, and for few tokens as many as make a replay read 2 GB, if that is more."""
        H, N = self.shape(model)
        n_sets = 1 if self.once or self.mode == "dry" else max(4, math.ceil(2e9 / (6 * N * H)))
        if self._layers[0] != model:
            self.forget()  # free the old sets before the new ones are made
            make = lambda: Layer(  # noqa: E731
                self.random(2 * N, H, deviation=H**-0.5),
                self.random(H, N, deviation=N**-0.5),
                self.random(2, N, dtype=torch.float32),
            )
            self._layers = (model, [make() for _ in range(n_sets)])
        return self._layers[1][: n_sets if T <= 64 else 4]

    def token_weight(self, T) -> Tensor:
        """Two columns in which every token counts: ``[T, 2]``."""
        return self.random(T, 2, dtype=torch.float32).abs_() + 0.1

    def members(self, N, size, n_circuits=1) -> list[list[int]]:
        chosen = torch.Generator().manual_seed(N)
        return [torch.randperm(N, generator=chosen)[:size].tolist() for _ in range(n_circuits)]

    def steering(self, T, N, n_circuits, row_circuit=None, size=None) -> dict:
        """Circuits of 0.1% of the neurons, or of ``size`` neurons. By default token t uses circuit t % n_circuits."""
        members = self.members(N, size or even(N), n_circuits)
        scale = make_scale([{n: 0.25 * (n % 7) for n in neurons} for neurons in members], N, self.device)
        if row_circuit is None:
            row_circuit = torch.arange(T, device=self.device) % n_circuits
        return dict(scale=scale, row_circuit=row_circuit.int())

    def default(self, op, model, T) -> str:
        H, N = self.shape(model)
        return plans.default(make_call(op, T, N, H, self.arch, self.n_sm)).name

    def can_serve(self, op, name, model, T) -> bool:
        H, N = self.shape(model)
        return plans.can_serve(make_call(op, T, N, H, self.arch, self.n_sm), name)

    def measure(self, runs, sets, work: Work | None = None) -> Times:
        """Time ``runs``, name -> function of one set; see ``gpu_timing.measure``."""
        mode = "once" if self.once else self.mode
        return measure(mode, runs, sets, self.synchronize)._replace(work=work, device=self.target)


def even(N) -> int:
    """How many neurons a layer has of a circuit of 0.1% that is spread evenly over the layers."""
    return max(1, N // 1000)


def late(N) -> int:
    """How many a late layer has where 90% of the circuit lie in the last quarter of the layers: 52 in an 8B model."""
    return max(1, round(0.0036 * N))


def relative(got, exact):
    """Frobenius norm of the error over that of the exact answer; NaN if any element is NaN."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def ours(x, plan="", token_weight=None, steering=None, op="gated_mlp"):
    """A function of one Layer: the op on the Triton backend, by ``plan``; "" lets the backend choose."""

    def run(layer):
        use_plans(plan and f"{op}={plan}")
        sums = {} if token_weight is None else dict(token_weight=token_weight, act_sum=layer.act_sum)
        weights = (layer.w_gate_up, layer.w_down) if op == "gated_mlp" else (layer.w_down,)
        return getattr(ops, op)(x, *weights, **sums, **(steering or {}), backend="triton")

    return run


__all__ = ["Bench", "Layer", "Work", "brief", "catalogue", "device_of", "late", "make_call", "ours", "relative"]
