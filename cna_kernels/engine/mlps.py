"""The MLPs of a transformers model, summed and steered by the engine.

At each call the parts of an MLP, as they are then, decide what runs. The first case that holds:

0. a forward that is not known (``forwards.py``): that forward; sums and steering on the input of ``down_proj``.
1. backend ``reference``, float64, or others who watch all modules or functions: the model's own modules; sums and
   steering on the input of ``down_proj``. Unsteered rows are the plain model's to the bit.
2. SiLU, and plain Linear layers without bias: ``ops.gated_mlp``, all of the MLP in one op.
3. SiLU, but a quantised, adapted, hooked, offloaded or biased layer: the MLP's modules, with ``ops.swiglu`` between.
4. another activation: the MLP's modules up to act, then ``ops.down_proj`` if ``down_proj`` is a plain layer, else
   ``ops.steer_act`` and the module ``down_proj``.

A mixture of experts keeps the model's own grouped products; ``ops.swiglu`` serves the (token, expert) pairs. Neuron
``index`` of an expert is neuron ``expert * own + index`` of the layer in a circuit, where each expert has ``own``
neurons; see ``SteeringTable``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, ops, reference
from ..errors import InputError
from ..extras import Inputs
from ..scale import Scale
from ..serve import Looks, looks
from ..warm_up import blank_extras, warm_up
from .forwards import SILUS, is_one_of
from .passes import ForwardPass, State
from .patch import (
    STEERED,
    call_plain,
    is_replaced,
    mlp_forward,
    parameters_of,
    plain_function,
    replace_forward,
    restore_forward,
)

# The parts of an MLP.


def plain_weight(module: Any, dtype: torch.dtype | None = None) -> Tensor | None:
    """The weight of a layer without bias, adapter, hook or offloading, if it is of ``dtype`` (None: any of FLOATS)."""
    if type(module) is not nn.Linear:
        return None
    own = module.__dict__  # takes a quarter of the time of a module's attributes
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
    """Whether an activation is SiLU: the function, or a module that nobody has hooked."""
    if activation is F.silu:
        return True
    if not isinstance(activation, nn.Module) or type(activation).forward not in SILUS:
        return False
    own = activation.__dict__
    return "forward" not in own and not has_hooks(own)


def has_hooks(own: dict[str, Any]) -> bool:
    """Whether a module has a hook; ``own`` is the module's ``__dict__``."""
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def name_of(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def kind_of(module: Any) -> str:
    return f"{type(module).__module__.split('.')[0]}.{type(module).__name__}"


# The MLPs.


class SteeredMLP:
    """An MLP: ``down_proj(activation(gate) * up)``.

    Attributes:
        LAYERS: the names of its linear layers, ``down_proj`` last. ACTIVATION: the name of its activation.
        FORWARDS: the functions whose formula the ops compute.
        known: whether the module's own forward is one of them.
        scale: the layer's part of the engine's table.
        sums: the buffers ``act_sum`` and ``act_sumsq`` of the running collection; empty without one.
        runs: how often the MLP has run in the pass that is summed. ran: whether it has in the pass that is steered.
    """

    LAYERS: tuple[str, ...] = ()
    ACTIVATION = ""
    FORWARDS: tuple[Any, ...] = ()

    def __init__(self, module: nn.Module, layer: int, backend: str | None, now: ForwardPass) -> None:
        self.module: Any = module  # an nn.Module, whose parts are found by name
        self.layer, self.backend, self.now = layer, backend, now
        self.own_width = self.width(module) // self.n_experts(module)
        self.in_modules = backends.name_for(self.device(module), backend) == "reference"
        self.scale: Scale | None = None
        self.sums: dict[str, Tensor] = {}
        self.runs, self.ran = 0, False
        self.bound: Any = None  # what the module's attribute "forward" holds
        self._look()

    def __deepcopy__(self, _: object) -> None:
        return None  # a copy of an attached model is a plain model

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def put_on(self) -> None:
        setattr(self.module, STEERED, self)
        replace_forward(self.module, mlp_forward)
        self.bound = self.module.__dict__.get("forward")

    def take_off(self) -> None:
        restore_forward(self.module)
        delattr(self.module, STEERED)

    def _look(self) -> None:
        """See which forward the module has of its own."""
        self.function = plain_function(self.module)
        self.code = getattr(self.function, "__code__", None)
        self.of_class = type(self.module).forward
        self.names = parameters_of(self.function)
        self.known = self.knows(self.function)

    @classmethod
    def knows(cls, function: Any) -> bool:
        """Whether a forward is one of those that the ops compute."""
        return is_one_of(function, *cls.FORWARDS)

    def is_in_place(self) -> bool:
        """The answer of :meth:`check_in_place` in the usual case, in a tenth of a microsecond; False is no answer."""
        module = self.module
        return (
            module.__dict__.get("forward") is self.bound
            and type(module).forward is self.of_class
            and self.known
            and self.function.__code__ is self.code
        )

    def check_in_place(self) -> None:
        """Raise InputError unless the MLP is steered when its module is called; made before every pass."""
        if not is_replaced(self.module, mlp_forward):
            what = f"the forward of layers[{self.layer}]'s MLP was replaced after attach"
            raise InputError("model", f"{what}; detach, and attach again")
        if type(self.module).forward is not self.of_class or getattr(self.function, "__code__", None) is not self.code:
            self._replaced()

    def _replaced(self) -> None:
        """The class of the module has got another forward since attach."""
        what = f"the forward of {type(self.module).__name__}, in layers[{self.layer}], was replaced after attach"
        raise InputError("model", f"{what}; detach, and attach again")

    def is_off(self) -> bool:
        """Whether the module, where no pass is at hand and no row is known, shall run as if there were no engine.

        Raises:
            InputError: rows are steered, so that somebody may expect it here.
        """
        if self.now.again() is not None:
            return False
        if self.now.rows.steers:
            raise InputError("attach", "an MLP ran outside its model's forward pass, where no row is known")
        self.now.check_not_run_again()
        return True

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes without an engine."""
        return call_plain(self.module, *args, **kwargs)

    def in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with those by place that its forward takes, as far as they follow each other."""
        names, kwargs = self.names[len(args) :], dict(kwargs)
        for name in names:
            if name not in kwargs:
                break
            args = (*args, kwargs.pop(name))
        return args, kwargs

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes, summed and steered."""
        raise NotImplementedError

    @staticmethod
    def check(module: Any, where: str) -> None:
        """Raise InputError for a module that this kind of SteeredMLP cannot serve."""

    @staticmethod
    def width(module: Any) -> int:
        """The number of neurons of the module."""
        width: int = module.down_proj.in_features
        return width

    @staticmethod
    def n_experts(module: Any) -> int:
        return 1

    @staticmethod
    def device(module: Any) -> torch.device:
        hook = getattr(module.down_proj, "_hf_hook", None)  # offloaded weights are on the meta device
        place = getattr(hook, "execution_device", None)
        if place is not None:
            return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        tensors = (x.device for part in (module.down_proj, module) for x in (*part.parameters(), *part.buffers()))
        return next(tensors, torch.device("cpu"))  # none: PyTorch's quantisation for CPUs hides the weights

    def plain_down(self) -> Tensor | None:
        """The weight of ``down_proj``, ``[H, N]`` or ``[E, H, N]``, if it is a plain parameter (not quantised, adapted
        or offloaded) in a dtype that holds every bf16 number; else None."""
        down: Any = self.module.down_proj
        weight = down.weight if type(down) is nn.Linear else down
        plain = type(weight) is nn.Parameter and not weight.is_meta
        return weight if plain and weight.dtype in (torch.bfloat16, torch.float32, torch.float64) else None

    def columns(self, index: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The columns ``[H, k]`` of ``down_proj`` of k neurons, fp32. Of a layer whose weight is not plain (quantised,
        adapted, offloaded) they are what the layer makes, in ``dtype``, of vectors that are 1 at one neuron."""
        down: Any = self.module.down_proj
        weight = plain_weight(down)
        if weight is not None:
            return weight.detach()[:, torch.tensor(index, dtype=torch.int64, device=weight.device)].float()
        ones = torch.zeros(len(index) + 1, self.own_width, dtype=dtype, device=self.device(self.module))
        ones[range(len(index)), list(index)] = 1
        with torch.inference_mode():
            y: Tensor = down(ones)
        return (y[:-1].float() - y[-1].float()).T  # the last row is a bias, or 0

    def reason(self) -> str | None:
        """Why the MLP is not one op, or None."""
        if self.in_modules:
            return None
        found = [self._other_activation()]
        for name in self.LAYERS:
            part = getattr(self.module, name)
            if type(part) is not nn.Linear:
                found.append(f"{name} is {kind_of(part)}")
            elif plain_weight(part) is None:
                found.append(f"{name} has a bias, a hook or an unusual weight")
        return ", ".join(filter(None, found)) or None

    def activation(self) -> Any:
        return getattr(self.module, self.ACTIVATION)

    def _other_activation(self) -> str | None:
        activation = self.activation()
        if is_plain_silu(activation):
            return None
        hooked = isinstance(activation, nn.Module) and has_hooks(activation.__dict__)
        return "the activation has a hook" if hooked else f"the activation is {type(activation).__name__}"

    def example(self, n_tokens: int) -> tuple[str, Inputs]:
        """The op that serves the MLP as it is now, and inputs for a call of that op with ``n_tokens`` tokens."""
        layers = [getattr(self.module, name) for name in self.LAYERS]
        weights = [weight for layer in layers if (weight := plain_weight(layer)) is not None]
        like = next(
            (x for x in self.module.parameters() if x.dtype in ops.FLOATS), torch.empty(0, dtype=torch.bfloat16)
        )
        device = self.device(self.module)

        def blank(n: int) -> Tensor:
            return torch.empty(n_tokens, n, dtype=like.dtype, device=device)

        if not self.known:
            return "steer_act", (blank(self.own_width),)
        silu = is_plain_silu(self.activation())
        if silu and weights and len(weights) == len(layers):
            w_gate, w_up = (weights[0], None) if len(weights) == 2 else (weights[0], weights[1])
            return "gated_mlp", (blank(w_gate.shape[1]), w_gate, w_up, weights[-1])
        if silu:
            halves = blank(self.own_width), blank(self.own_width)
            return "swiglu", halves if len(layers) == 3 else blank(2 * self.own_width).chunk(2, dim=1)
        w_down = plain_weight(layers[-1]) if layers else None
        act = blank(self.own_width)
        return ("steer_act", (act,)) if w_down is None else ("down_proj", (act, w_down))

    def example_inputs(self, n_tokens: int) -> Inputs:
        return self.example(n_tokens)[1]

    def steer(self, act: Tensor) -> Tensor:
        """act ``[..., N]`` -> a scaled copy ``[..., N]``; act is summed on the way."""
        extras, flat = self.extras(act.shape[-1], act.device), act.flatten(0, -2)
        if act.dtype not in ops.FLOATS:
            return reference.steer_act(flat, **extras).view(act.shape)
        return ops.steer_act(flat, **extras, backend=self.backend).view(act.shape)

    def extras(self, width: int, device: torch.device, state: State | None = None) -> dict[str, Any]:
        """The optional arguments of an op on act with ``width`` neurons; ``state`` as :meth:`state` returns it."""
        if width != self.own_width:
            what = f"layer {self.layer}: down_proj takes {width} neurons here, {self.own_width} were expected"
            raise InputError("model", f"{what}; a model whose MLPs are split over devices cannot be attached")
        tokens, token_weight, _, scales = state or self.state()
        assert tokens is not None, "is_off was asked"
        extras: dict[str, Any] = {
            "scale": self.scale if scales is None else scales[self.layer],
            "row_circuit": tokens.to(device),
        }
        if token_weight is not None:
            extras["token_weight"] = token_weight.to(device)
            extras |= self.sums
        return extras

    def state(self) -> State:
        """The pass that the MLP runs in; that of its first run where gradient checkpointing runs it again."""
        state = self.now.state
        return state if state.tokens is not None else self.now.again() or state


def warm_up_mlps(
    mlps: Sequence[SteeredMLP], n_experts: Sequence[int], longest: int, n_columns: int, squares: bool
) -> list[int]:
    """See ``Engine.warm_up``."""
    distinct: dict[Looks, SteeredMLP] = {}
    for mlp in mlps:
        if not mlp.in_modules:
            op, tensors = mlp.example(1)
            distinct.setdefault(looks(op, tensors, (), mlp.backend), mlp)
    called: set[int] = set()
    for (op, *_), mlp in distinct.items():
        for columns in dict.fromkeys((0, n_columns)):
            extras_of = functools.partial(
                blank_extras, n_neurons=mlp.own_width, device=mlp.device(mlp.module), scale=mlp.scale,
                n_columns=columns * n_experts[mlp.layer], squares=squares,
            )  # fmt: skip
            called.update(warm_up(op, mlp.example_inputs, extras_of, longest, mlp.backend))
    return sorted(called)
