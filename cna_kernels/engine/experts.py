"""The experts of a mixture, summed and steered by the engine."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import InputError
from .forwards import is_in_file
from .mlps import SteeredMLP, is_plain_silu, name_of
from .passes import ForwardPass, State
from .patch import apply_gate

# The values that these attributes of experts must have. No version of transformers has all of the attributes;
# _is_hooked tells of a model split over devices.
PLAIN_EXPERTS = dict(
    has_bias=False, is_transposed=False, has_gate=True, has_post_expert_norm=False, _is_expert_parallel=False,
    _is_hooked=False,
)  # fmt: skip


DISPATCH = "transformers.integrations.moe"


class Experts(SteeredMLP):
    """The experts of a mixture, whose weights are ``[E, 2N, H]`` and ``[E, H, N]``.

    The products stay with the implementation that the model is configured for, which hands gate and up of the
    (token, expert) pairs to ``_apply_gate``; that method is replaced. A pair whose token uses circuit c takes circuit
    ``c * E + expert`` of the layer's table, and column c of its token is column ``c * E + expert`` of the sums.
    """

    ACTIVATION = "act_fn"
    GROUPED, BATCHED, EAGER = "grouped_mm", "batched_mm", "eager"

    def __init__(self, module: nn.Module, layer: int, backend: str | None, now: ForwardPass) -> None:
        super().__init__(module, layer, backend, now)
        self.gate = type(self.module)._apply_gate
        self.idle, self.gated = False, False  # whether the module runs without the engine; whether its gate was called
        self.pairs: tuple[Tensor, Tensor] | None = None  # the token and the expert of each pair of this call

    @staticmethod
    def check(module: Any, where: str) -> None:
        gate: Any = module.__dict__.get("_apply_gate")
        if gate is None or getattr(gate, "__func__", None) is apply_gate:
            gate = type(module)._apply_gate
        if any(getattr(module, name, plain) != plain for name, plain in PLAIN_EXPERTS.items()):
            what = "experts with a bias or a norm, transposed, without a gate or split over devices"
            raise InputError("model", f"{where}: {what}")
        if not is_in_file(gate, DISPATCH, "_default_apply_gate"):
            raise InputError("model", f"{where}: experts with a gate of their own ({name_of(gate)})")

    @classmethod
    def knows(cls, function: Any) -> bool:
        """Whether a forward is transformers' dispatcher, before the loop over experts that Mixtral has."""
        if not is_in_file(function, DISPATCH, "use_experts_implementation", "wrapper", "forward"):
            return False
        cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
        loop = cells["original_forward"].cell_contents
        return is_in_file(loop, "transformers.models.mixtral.modeling_mixtral", "MixtralExperts", "forward")

    @staticmethod
    def width(module: Any) -> int:
        width: int = module.num_experts * module.down_proj.shape[2]
        return width

    @staticmethod
    def n_experts(module: Any) -> int:
        n_experts: int = module.num_experts
        return n_experts

    @staticmethod
    def device(module: Any) -> torch.device:
        device: torch.device = module.down_proj.device
        return device

    def columns(self, index: Sequence[int], dtype: torch.dtype) -> Tensor:
        weight: Tensor = self.module.down_proj.detach()  # [E, H, N]
        place = torch.tensor(index, dtype=torch.int64, device=weight.device)
        return weight[place // self.own_width, :, place % self.own_width].float().T

    def put_on(self) -> None:
        super().put_on()
        self.module._apply_gate = types.MethodType(apply_gate, self.module)

    def take_off(self) -> None:
        super().take_off()
        del self.module._apply_gate

    def reason(self) -> str | None:
        return None if self.in_modules else self._other_activation()

    def check_in_place(self) -> None:
        super().check_in_place()
        if type(self.module)._apply_gate is not self.gate:
            what = f"_apply_gate of {type(self.module).__name__} was replaced after attach"
            raise InputError("model", f"{what}; detach, and attach again")

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        self.idle = True
        try:
            return super().plain(*args, **kwargs)
        finally:
            self.idle = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """hidden states ``[T, H]``, the k experts of each token and their weights, ``[T, k]`` each -> y ``[T, H]``"""
        if kwargs or len(args) != 3:
            return self.plain(*args, **kwargs)  # raises what it raises without an engine
        hidden_states, top_k_index, top_k_weights = args
        self.ran = True
        if self.state().token_weight is not None:
            self.runs += 1
        how = self.module.config._experts_implementation
        if how == self.EAGER:
            return self.one_by_one(hidden_states, top_k_index, top_k_weights)
        experts, n_each = top_k_index.reshape(-1), top_k_index.shape[-1]
        if how == self.GROUPED:
            experts, order = torch.sort(experts)
            self.pairs = order // n_each, experts
        elif how == self.BATCHED:
            self.pairs = torch.arange(len(experts), dtype=torch.int64, device=experts.device) // n_each, experts
        else:
            raise InputError("experts_implementation", f"expected grouped_mm, batched_mm or eager, got {how!r}")
        self.gated = False
        try:
            y = super().plain(hidden_states, top_k_index, top_k_weights)
        finally:
            self.pairs = None
        if not self.gated:
            what = f"layers[{self.layer}]: experts_implementation {how!r} called no _apply_gate"
            raise InputError("model", f"{what}, so that its neurons cannot be steered")
        return y

    def one_by_one(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            self.pairs = token, torch.full_like(token, expert)
            act = self.act(F.linear(x[token], self.module.gate_up_proj[expert]))
            part = F.linear(act, self.module.down_proj[expert]) * top_k_weights[token, place, None]
            y.index_add_(0, token, part.to(y.dtype))
        self.pairs = None
        return y

    def act(self, gate_up: Tensor) -> Tensor:
        """gate_up ``[P, 2N]`` of P (token, expert) pairs -> their act ``[P, N]``, summed and scaled."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.idle:
            return self.gate(self.module, gate_up)  # type: ignore[no-any-return]
        self.gated = True
        one_by_one = self.in_modules or self.state().in_modules or gate.dtype not in ops.FLOATS
        if one_by_one or not is_plain_silu(self.module.act_fn):
            return self.steer(self.module.act_fn(gate) * up)
        return ops.swiglu(gate, up, **self.extras(gate.shape[1], gate.device), backend=self.backend)

    def extras(self, width: int, device: torch.device, state: State | None = None) -> dict[str, Any]:
        """The optional arguments of an op on the act of (token, expert) pairs: one row for each pair, not token."""
        extras = super().extras(width, device, state)
        if self.pairs is None:
            raise InputError("attach", "a mixture's gate ran outside its forward pass, where no token is known")
        token, expert = self.pairs
        n_experts = self.module.num_experts
        circuit = extras["row_circuit"][token]
        extras["row_circuit"] = torch.where(circuit >= 0, circuit * n_experts + expert, -1).int()
        if "token_weight" in extras:
            mine = expert[:, None] == torch.arange(n_experts, dtype=torch.int64, device=expert.device)  # [P, E]
            of_pairs = extras["token_weight"][token]  # [P, C]
            extras["token_weight"] = (of_pairs[:, :, None] * mine[:, None]).flatten(1)  # [P, C * E]
            for name in self.sums:
                extras[name] = self.sums[name].view(-1, width)  # [C, E * N] -> [C * E, N]
        return extras
