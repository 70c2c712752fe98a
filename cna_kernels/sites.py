"""The MLPs of a transformers model as places where the engine works, and how their ``forward`` is replaced.

What an MLP runs is decided at each call by what its parts are then, the first that holds:

1. backend ``reference``, or float64: the model's own modules; sums and steering on the input of ``down_proj``.
   Unsteered rows are the plain model's to the bit.
2. plain Linear layers without bias and SiLU: ``ops.gated_mlp``, all of the MLP in one op.
3. SiLU, but a quantised, adapted, hooked, offloaded or biased layer: its modules, with ``ops.swiglu`` between them.
4. another activation: the same with ``ops.down_proj`` where that layer is plain, else ``ops.steer_act``.

A mixture of experts keeps the model's own grouped products; ``ops.swiglu`` serves the (token, expert) pairs. Its
neurons are (layer, expert, index), in a circuit (layer, expert * own + index), see ``SteeringTable``.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, ops, reference
from .checks import InputError
from .reference import Scale

SUPPORTED = "Llama, Qwen2, Qwen3, Mistral, Gemma 1 to 3, Phi-3, Qwen3-MoE, Mixtral, and models whose MLPs are the same"
SITE, BEFORE = "_cna_site", "_cna_before"  # attributes of a module whose forward was replaced


class ForwardPass:
    """What the MLPs must know of the forward pass at hand.

    Attributes:
        tokens: ``[T]`` int32, the circuit of each token; None outside a pass.
        weight: ``[T, C]`` fp32, how much each token counts, or None where nothing is summed.
        again: ``tokens`` of the last pass with gradients, for layers that gradient checkpointing runs once more.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.weight: Tensor | None = None
        self.again: Tensor | None = None


# Replacing a module's forward. What replaces it is called "forward", so that a pickled model asks its class for it.


def slot(module: nn.Module) -> str:
    """Where a module's forward lies: accelerate keeps it behind its hook, which moves and loads weights first."""
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def replace_forward(module: nn.Module, function: Any) -> None:
    current = module.__dict__.get(slot(module))
    if getattr(current, "__func__", None) is not function:  # a copy of an attached module has it, without an engine
        setattr(module, BEFORE, current)
        setattr(module, slot(module), types.MethodType(function, module))


def is_replaced(module: nn.Module, function: Any) -> bool:
    return getattr(module.__dict__.get(slot(module)), "__func__", None) is function


def restore_forward(module: nn.Module) -> None:
    before, place = module.__dict__.pop(BEFORE), slot(module)
    if before is None and place == "_old_forward":  # accelerate's hook came later, and asks for it
        before = types.MethodType(type(module).forward, module)
    if before is None:
        delattr(module, place)
    else:
        setattr(module, place, before)


def call_plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that was there before."""
    before = getattr(module, BEFORE, None)
    return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)


def mlp_forward(self, *args, **kwargs):
    site = getattr(self, SITE, None)
    return call_plain(self, *args, **kwargs) if site is None else site.run(*args, **kwargs)


def apply_gate(self, gate_up):
    site = getattr(self, SITE, None)
    return type(self)._apply_gate(self, gate_up) if site is None else site.act(gate_up)


mlp_forward.__name__, apply_gate.__name__ = "forward", "_apply_gate"


# What a part of an MLP is.


def plain_weight(module: Any, dtype: torch.dtype | None = None) -> Tensor | None:
    """The weight, of that dtype, of a layer that is only a product with it: no bias, adapter, hook or offloading."""
    if type(module) is not nn.Linear:
        return None
    own = module.__dict__  # a quarter of the time that attributes of a module take
    parameters = own["_parameters"]
    weight = parameters.get("weight")
    if (
        type(weight) is not nn.Parameter
        or parameters.get("bias") is not None
        or "forward" in own
        or has_hooks(own)
        or (weight.dtype not in ops.FLOATS if dtype is None else weight.dtype != dtype)
        or weight.stride(1) != 1
        or weight.is_meta
    ):
        return None
    return weight


def is_plain_silu(activation: Any) -> bool:
    """SiLU as a function, or as a module that nobody has hooked."""
    if activation is F.silu:
        return True
    if not (isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"):
        return False
    own = activation.__dict__
    return "forward" not in own and not has_hooks(own)


def has_hooks(own: dict[str, Any]) -> bool:
    """Whether a module, of which these are the attributes, has a hook."""
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def kind_of(module: Any) -> str:
    return f"{type(module).__module__.split('.')[0]}.{type(module).__name__}"


# The MLPs.


class Site:
    """An MLP: ``down_proj(activation(gate) * up)``.

    Attributes:
        LAYERS: the names of its linear layers, ``down_proj`` last. ACTIVATION: of its activation.
        scale: the layer's part of the engine's table.
        sums: ``act_sum`` and ``act_sumsq`` of the collection at hand, or None.
    """

    LAYERS: tuple[str, ...] = ()
    ACTIVATION = ""

    def __init__(self, mlp: nn.Module, layer: int, backend: str | None, now: ForwardPass) -> None:
        self.mlp, self.layer, self.backend, self.now = mlp, layer, backend, now
        self.own_width = self.width(mlp) // self.n_experts(mlp)
        self.in_modules = backends.name_for(self.device(mlp), backend) == "reference"
        self.scale: Scale | None = None
        self.sums: dict[str, Tensor] | None = None

    def __deepcopy__(self, _):
        return None  # a copy of an attached model is a plain model

    def __reduce__(self):
        return type(None), ()

    def put_on(self) -> None:
        setattr(self.mlp, SITE, self)
        replace_forward(self.mlp, mlp_forward)

    def take_off(self) -> None:
        restore_forward(self.mlp)
        delattr(self.mlp, SITE)

    @staticmethod
    def check(mlp: nn.Module, where: str) -> None:
        """Refuse what this kind of site cannot serve."""

    @staticmethod
    def n_experts(mlp: nn.Module) -> int:
        return 1

    @staticmethod
    def device(mlp: nn.Module) -> torch.device:
        hook = getattr(mlp.down_proj, "_hf_hook", None)  # offloaded weights are on the meta device
        place = getattr(hook, "execution_device", None)
        if place is not None:
            return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        tensors = (x.device for part in (mlp.down_proj, mlp) for x in (*part.parameters(), *part.buffers()))
        return next(tensors, torch.device("cpu"))  # packed out of sight, by PyTorch's own quantisation for CPUs

    def plain_down(self) -> Tensor | None:
        """The weight of ``down_proj``, ``[H, N]`` or ``[E, H, N]``, if nothing is put on top of it and it lies open."""
        down = self.mlp.down_proj
        weight = down.weight if type(down) is nn.Linear else down if isinstance(down, nn.Parameter) else None
        return None if weight is None or weight.is_meta or weight.dtype not in ops.FLOATS else weight

    def reason(self) -> str | None:
        """Why the MLP is not one op, or None."""
        if self.in_modules:
            return None
        found = [self._other_activation()]
        for name in self.LAYERS:
            part = getattr(self.mlp, name)
            if type(part) is not nn.Linear:
                found.append(f"{name} is {kind_of(part)}")
            elif plain_weight(part) is None:
                found.append(f"{name} has a bias, a hook or an unusual weight")
        return ", ".join(filter(None, found)) or None

    def activation(self) -> Any:
        return getattr(self.mlp, self.ACTIVATION)

    def _other_activation(self):
        activation = self.activation()
        if is_plain_silu(activation):
            return None
        hooked = isinstance(activation, nn.Module) and has_hooks(activation.__dict__)
        return "the activation has a hook" if hooked else f"the activation is {type(activation).__name__}"

    def run(self, x: Tensor) -> Tensor:
        """x ``[..., H]`` -> y ``[..., H]``"""
        if self.in_modules or x.dtype not in ops.FLOATS:
            return self.mlp.down_proj(self.steer(self.plain_act(x)))
        modules = self.mlp.__dict__["_modules"]
        silu = is_plain_silu(modules.get(self.ACTIVATION) or self.activation())
        weights = [plain_weight(modules[name], x.dtype) for name in self.LAYERS]
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            weights = [None] * len(weights)  # the layers' own products are in another dtype
        *first, w_down = weights
        if silu and all(weight is not None for weight in weights):
            w_gate_up = first[0] if len(first) == 1 else tuple(first)
            extras = self.extras(w_down.shape[1], x.device)
            return ops.gated_mlp(x.flatten(0, -2), w_gate_up, w_down, **extras, backend=self.backend).view_as(x)
        down = modules["down_proj"]
        if silu:
            gate, up = self.gate_and_up(x)
            extras = self.extras(gate.shape[-1], gate.device)
            act = ops.swiglu(gate.flatten(0, -2), up.flatten(0, -2), **extras, backend=self.backend)
            return down(act.view(*x.shape[:-1], -1))
        act = self.plain_act(x)
        if w_down is not None and act.dtype == x.dtype:
            extras = self.extras(act.shape[-1], act.device)
            y = ops.down_proj(act.flatten(0, -2), w_down, **extras, backend=self.backend)
            return y.view(*x.shape[:-1], -1)
        return down(self.steer(act))

    def example(self, n_tokens: int) -> tuple[str, tuple]:
        """The op that serves the MLP as it is now, and tensors of which it could be called with so many tokens."""
        layers = [getattr(self.mlp, name) for name in self.LAYERS]
        weights = [plain_weight(layer) for layer in layers]
        like = next((x for x in self.mlp.parameters() if x.dtype in ops.FLOATS), torch.empty(0, dtype=torch.bfloat16))
        device = self.device(self.mlp)

        def blank(n):
            return torch.empty(n_tokens, n, dtype=like.dtype, device=device)

        *first, w_down = weights or [None]
        silu = is_plain_silu(self.activation())
        if silu and weights and all(weight is not None for weight in weights):
            w_gate, w_up = (first[0], None) if len(first) == 1 else first
            return "gated_mlp", (blank(w_gate.shape[1]), w_gate, w_up, w_down)
        if silu:
            halves = blank(self.own_width), blank(self.own_width)
            return "swiglu", halves if len(first) == 2 else blank(2 * self.own_width).chunk(2, dim=1)
        return (
            ("steer_act", (blank(self.own_width),))
            if w_down is None
            else ("down_proj", (blank(self.own_width), w_down))
        )

    def steer(self, act: Tensor) -> Tensor:
        """act ``[..., N]``, summed and scaled."""
        extras, flat = self.extras(act.shape[-1], act.device), act.flatten(0, -2)
        if act.dtype not in ops.FLOATS:
            return reference.steer_act(flat, **extras).view(act.shape)
        return ops.steer_act(flat, **extras, backend=self.backend).view(act.shape)

    def extras(self, width: int, device: torch.device) -> dict[str, Any]:
        """The optional arguments of an op on act of that width."""
        if width != self.own_width:
            what = f"layer {self.layer}: down_proj takes {width} neurons here, {self.own_width} were expected"
            raise InputError("model", f"{what}; a model whose MLPs are split over devices cannot be attached")
        now = self.now
        tokens = now.tokens
        if tokens is None and torch.is_grad_enabled():
            tokens = now.again
        if tokens is None:
            raise InputError("attach", "an MLP ran outside its model's forward pass, where no row is known")
        extras = {"scale": self.scale, "row_circuit": tokens.to(device)}
        if now.weight is not None:
            extras["weight"] = now.weight.to(device)
            extras |= self.sums
        return extras


class Apart(Site):
    """gate_proj and up_proj: Llama and most others."""

    LAYERS = ("gate_proj", "up_proj", "down_proj")
    ACTIVATION = "act_fn"

    @staticmethod
    def width(mlp: nn.Module) -> int:
        return mlp.down_proj.in_features

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp.gate_proj(x), self.mlp.up_proj(x)

    def plain_act(self, x: Tensor) -> Tensor:
        return self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)


class Joined(Site):
    """gate_up_proj, one layer: Phi-3."""

    LAYERS = ("gate_up_proj", "down_proj")
    ACTIVATION = "activation_fn"

    @staticmethod
    def width(mlp: nn.Module) -> int:
        return mlp.down_proj.in_features

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp.gate_up_proj(x).chunk(2, dim=-1)

    def plain_act(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x)
        return up * self.mlp.activation_fn(gate)


# What experts must be. No version of transformers has all of these; _is_hooked tells of a model split over devices.
PLAIN_EXPERTS = dict(
    has_bias=False, is_transposed=False, has_gate=True, has_post_expert_norm=False, _is_expert_parallel=False,
    _is_hooked=False,
)  # fmt: skip


class Experts(Site):
    """The experts of a mixture, whose weights are ``[E, 2N, H]`` and ``[E, H, N]``.

    The products stay with the implementation that the model is configured for; it hands the gate and up of its
    (token, expert) pairs to ``_apply_gate``, which is replaced. In the layer's table a pair uses circuit
    ``c * E + expert``, and in its sums column ``c * E + expert``.
    """

    ACTIVATION = "act_fn"
    GROUPED, BATCHED, EAGER = "grouped_mm", "batched_mm", "eager"

    def __init__(self, mlp: nn.Module, layer: int, backend: str | None, now: ForwardPass) -> None:
        super().__init__(mlp, layer, backend, now)
        self.pairs: tuple[Tensor, Tensor] | None = None  # of the call at hand: the token and the expert of each

    @staticmethod
    def check(mlp: nn.Module, where: str) -> None:
        from transformers.integrations.moe import _default_apply_gate

        gate = mlp.__dict__.get("_apply_gate", type(mlp)._apply_gate)
        gate = getattr(gate, "__func__", gate)
        if any(getattr(mlp, name, plain) != plain for name, plain in PLAIN_EXPERTS.items()):
            what = "experts with a bias or a norm, transposed, without a gate or split over devices"
            raise InputError("model", f"{where}: {what}")
        if gate not in (_default_apply_gate, apply_gate):
            raise InputError("model", f"{where}: experts with a gate of their own ({gate.__qualname__})")

    @staticmethod
    def width(mlp: nn.Module) -> int:
        return mlp.num_experts * mlp.down_proj.shape[2]

    @staticmethod
    def n_experts(mlp: nn.Module) -> int:
        return mlp.num_experts

    @staticmethod
    def device(mlp: nn.Module) -> torch.device:
        return mlp.down_proj.device

    def put_on(self) -> None:
        super().put_on()
        self.mlp._apply_gate = types.MethodType(apply_gate, self.mlp)

    def take_off(self) -> None:
        super().take_off()
        del self.mlp._apply_gate

    def reason(self) -> str | None:
        return None if self.in_modules else self._other_activation()

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H]``, the experts of each token ``[T, k]`` and what they weigh -> ``[T, H]``"""
        how = self.mlp.config._experts_implementation
        if how == self.EAGER:
            return self.one_by_one(hidden_states, top_k_index, top_k_weights)
        experts, n_each = top_k_index.reshape(-1), top_k_index.shape[-1]
        if how == self.GROUPED:
            experts, order = torch.sort(experts)
            self.pairs = order // n_each, experts
        elif how == self.BATCHED:
            self.pairs = torch.arange(len(experts), device=experts.device) // n_each, experts
        else:
            raise InputError("experts_implementation", f"expected grouped_mm, batched_mm or eager, got {how!r}")
        try:
            return call_plain(self.mlp, hidden_states, top_k_index, top_k_weights)
        finally:
            self.pairs = None

    def one_by_one(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            self.pairs = token, torch.full_like(token, expert)
            act = self.act(F.linear(x[token], self.mlp.gate_up_proj[expert]))
            part = F.linear(act, self.mlp.down_proj[expert]) * top_k_weights[token, place, None]
            y.index_add_(0, token, part.to(y.dtype))
        self.pairs = None
        return y

    def act(self, gate_up: Tensor) -> Tensor:
        """``[P, 2N]`` of the pairs -> their act ``[P, N]``, summed and scaled."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.in_modules or gate.dtype not in ops.FLOATS or not is_plain_silu(self.mlp.act_fn):
            return self.steer(self.mlp.act_fn(gate) * up)
        return ops.swiglu(gate, up, **self.extras(gate.shape[1], gate.device), backend=self.backend)

    def extras(self, width: int, device: torch.device) -> dict[str, Any]:
        """The same of the pairs instead of the tokens."""
        extras = super().extras(width, device)
        token, expert = self.pairs
        n_experts = self.mlp.num_experts
        circuit = extras["row_circuit"][token]
        extras["row_circuit"] = torch.where(circuit >= 0, circuit * n_experts + expert, -1).int()
        if "weight" in extras:
            mine = expert[:, None] == torch.arange(n_experts, device=expert.device)  # [P, E]
            extras["weight"] = (extras["weight"][token][:, :, None] * mine[:, None]).flatten(1)  # [P, C * E]
            for name in self.sums:
                extras[name] = self.sums[name].view(-1, width)  # [C, E * N] -> [C * E, N]
        return extras


# Finding them.


def find_decoder(model: nn.Module) -> nn.Module:
    """The module whose ``layers`` are the model's."""
    inner = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise InputError("model", f"{type(inner).__name__} has no decoder with `layers`; supported: {SUPPORTED}")
    return decoder


def find_mlp(layer: nn.Module, where: str) -> tuple[str, type[Site]]:
    """The name of the MLP in a layer and the kind of site that serves it, known by the code of its forward.

    Raises:
        InputError: there is none, or something beside it looks like another.
    """
    named = dict(layer.named_modules())
    found = {name: kind for name, module in named.items() if (kind := _kind_for(module)) is not None}
    what = f"{where}, a {type(layer).__name__}, has"
    if len(found) != 1:
        known = "several MLPs" if found else "no MLP that is known (gate_proj or gate_up_proj with down_proj)"
        raise InputError("model", f"{what} {known}; supported: {SUPPORTED}")
    ((name, kind),) = found.items()
    for other, module in named.items():
        related = other.startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") or not other
        if not related and _looks_like_an_mlp(module):
            raise InputError("model", f"{what} {other} beside {name}; supported: {SUPPORTED}")
    kind.check(named[name], where)
    return name, kind


def _kind_for(module):
    """The kind of site by what the module's forward does: the code of one of three modules of transformers."""
    if not hasattr(module, "down_proj"):
        return None
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    code = _code(type(module))
    for known, kind in ((LlamaMLP, Apart), (Phi3MLP, Joined), (MixtralExperts, Experts)):
        if code == _code(known):
            return kind
    return None


def _code(kind):
    function = getattr(kind.forward, "__wrapped__", kind.forward)
    code = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_consts)


def _looks_like_an_mlp(module):
    words = type(module).__name__.lower()
    stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    return stacked or any(word in words for word in ("mlp", "expert", "feedforward", "ffn"))
