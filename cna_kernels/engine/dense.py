"""MLPs of linear layers: gate and up apart, or joined in one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import InputError
from .forwards import apart, apart_in_steps, joined
from .mlps import SteeredMLP, is_plain_silu, name_of, plain_weight
from .passes import ForwardPass
from .patch import STEERED, down_forward, is_replaced, replace_forward, restore_forward


class Dense(SteeredMLP):
    """An MLP of linear layers.

    Where its forward is not known, that of its ``down_proj`` is replaced, too: it steers its input while the MLP runs.

    Attributes:
        down: the ``down_proj`` whose forward is replaced, or None.
    """

    def __init__(self, module: nn.Module, layer: int, backend: str | None, now: ForwardPass) -> None:
        self.down: Any = None
        self.running, self.n_downs = False, 0
        super().__init__(module, layer, backend, now)

    def put_on(self) -> None:
        super().put_on()
        self._watch_down()

    def take_off(self) -> None:
        super().take_off()
        self._unwatch_down()

    def _watch_down(self) -> None:
        """Replace the forward of the ``down_proj`` that the MLP has now, if the MLP's own forward is to call it."""
        self._unwatch_down()
        if not self.known:
            self.down = self.module.down_proj
            setattr(self.down, STEERED, self)
            replace_forward(self.down, down_forward)

    def _unwatch_down(self) -> None:
        if self.down is not None:
            if is_replaced(self.down, down_forward):
                restore_forward(self.down)
            delattr(self.down, STEERED)
            self.down = None

    def check_in_place(self) -> None:
        super().check_in_place()
        if self.down is None or (self.module.down_proj is self.down and is_replaced(self.down, down_forward)):
            return
        if torch.compiler.is_compiling():
            what = f"down_proj in layers[{self.layer}] was replaced after attach"
            raise InputError("model", f"{what}; detach, and attach again")
        self._watch_down()

    def _replaced(self) -> None:
        if torch.compiler.is_compiling():
            super()._replaced()
        self._look()
        self._watch_down()

    def reason(self) -> str | None:
        return super().reason() if self.known else f"its forward is its own, {name_of(self.function)}"

    def run_own(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward computes, whose call of ``down_proj`` comes back to ``steer_argument``."""
        self.running, self.n_downs = True, 0
        try:
            y = self.plain(*args, **kwargs)
        finally:
            self.running = False
        if self.n_downs != 1:
            what = f"layers[{self.layer}]: its MLP's forward, {name_of(self.function)}, called down_proj"
            raise InputError("model", f"{what} {self.n_downs} times, expected once; its neurons cannot be steered")
        return y

    def steer_argument(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of ``down_proj`` with act summed and steered, if it is the MLP that calls."""
        if not self.running:
            return args, kwargs
        self.n_downs += 1
        if args:
            return (self.steer(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.steer(kwargs[name])}

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[..., H]`` -> gate and up ``[..., N]`` of the model's own layers"""
        raise NotImplementedError

    def plain_act(self, x: Tensor) -> Tensor:
        """x ``[..., H]`` -> act ``[..., N]`` as the model itself computes it"""
        raise NotImplementedError

    def run(self, x: Tensor, *more: Any, **kwargs: Any) -> Any:
        """x ``[..., H]`` -> y ``[..., H]``"""
        state = self.now.state
        if state.tokens is None:
            state = self.state()
        self.ran = True
        if state.token_weight is not None:
            self.runs += 1
        if not self.known:
            return self.run_own(x, *more, **kwargs)
        if more or kwargs:
            return self.plain(x, *more, **kwargs)  # raises what it raises without an engine
        if self.in_modules or state.in_modules or x.dtype not in ops.FLOATS:
            y: Tensor = self.module.down_proj(self.steer(self.plain_act(x)))
            return y
        modules = self.module.__dict__["_modules"]
        silu = is_plain_silu(modules.get(self.ACTIVATION) or self.activation())
        weights = [plain_weight(modules[name], x.dtype) for name in self.LAYERS]
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            weights = [None] * len(weights)  # under autocast the layers multiply in another dtype
        plain = [weight for weight in weights if weight is not None]
        if silu and len(plain) == len(weights):
            w_gate_up = plain[0] if len(plain) == 2 else (plain[0], plain[1])
            extras = self.extras(plain[-1].shape[1], x.device, state)
            return ops.gated_mlp(x.flatten(0, -2), w_gate_up, plain[-1], **extras, backend=self.backend).view_as(x)
        down = modules["down_proj"]
        if silu:
            gate, up = self.gate_and_up(x)
            extras = self.extras(gate.shape[-1], gate.device)
            act = ops.swiglu(gate.flatten(0, -2), up.flatten(0, -2), **extras, backend=self.backend)
            y = down(act.view(*x.shape[:-1], -1))
            return y
        act, w_down = self.plain_act(x), weights[-1]
        if w_down is not None and act.dtype == x.dtype:
            extras = self.extras(act.shape[-1], act.device)
            y = ops.down_proj(act.flatten(0, -2), w_down, **extras, backend=self.backend)
            return y.view(*x.shape[:-1], -1)
        y = down(self.steer(act))
        return y


class Apart(Dense):
    """gate_proj and up_proj are two layers: Llama and most others."""

    LAYERS = ("gate_proj", "up_proj", "down_proj")
    ACTIVATION = "act_fn"
    FORWARDS = (apart, apart_in_steps)

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.module.gate_proj(x), self.module.up_proj(x)

    def plain_act(self, x: Tensor) -> Tensor:
        act: Tensor = self.module.act_fn(self.module.gate_proj(x)) * self.module.up_proj(x)
        return act


class Joined(Dense):
    """gate and up are one layer, gate_up_proj: Phi-3."""

    LAYERS = ("gate_up_proj", "down_proj")
    ACTIVATION = "activation_fn"
    FORWARDS = (joined,)

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.module.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up

    def plain_act(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x)
        act: Tensor = up * self.module.activation_fn(gate)
        return act
