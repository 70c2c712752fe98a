"""Edits of the residual stream of a model of transformers: an ``Edit`` behind PyTorch's forward hooks.

Where our own forward calls an Edit, hooks call it here: "mlp" on what a layer's MLP returns, ``after`` on what a layer
returns, and "embedding" and "attention" for an edit that takes a direction out of all writes. Taking it out of every
write is exact only where a layer adds to the stream just what its attention and its MLP return. That is looked at in
the pass itself; a layer that puts a norm or a factor between is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cna_kernels.errors import InputError

from ..steering import Edit

ATTENTION = ("self_attn", "attn", "attention")
FAR = 64  # roundings of the dtype by which a layer's sum may differ from its parts


class Edits:
    """The hooks of one decoder. ``mlp_names``: the name of each layer's MLP, or of its experts, in the layer."""

    def __init__(self, decoder: nn.Module, mlp_names: Sequence[str]) -> None:
        self.decoder, self.mlp_names = decoder, mlp_names

    @contextmanager
    def made_by(self, edit: Edit) -> Iterator[None]:
        """Let an Edit see, and change, the stream of the passes inside."""
        handles: list[Any] = []
        try:
            layers: Any = self.decoder.layers
            if edit.edits_writes:
                embedding: Any = self.decoder.get_input_embeddings()  # type: ignore[operator]
                handles.append(embedding.register_forward_hook(_changed(lambda y: edit.write(-1, "embedding", y))))
            for number, layer in enumerate(layers):
                handles += self._hooks(edit, number, layer)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, edit: Edit, number: int, layer: Any) -> Iterator[Any]:
        mlp = layer.get_submodule(self.mlp_names[number].split(".")[0])
        if not edit.edits_writes:
            yield mlp.register_forward_hook(_changed(lambda y: edit.write(number, "mlp", y)))
            yield layer.register_forward_hook(_changed(lambda x: edit.after(number, x)))
            return
        parts: list[Tensor] = []  # what the layer gets, and what its parts add

        def write(part: str, y: Tensor) -> Tensor:
            parts.append(edit.write(number, part, y))
            return parts[-1]

        def after(x: Tensor) -> Tensor:
            _check_sum(parts, x, number)
            parts.clear()
            return edit.after(number, x)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            parts[:] = [args[0] if args else kwargs["hidden_states"]]

        attention = next((getattr(layer, name) for name in ATTENTION if hasattr(layer, name)), None)
        if attention is None:
            raise InputError("model", f"layers[{number}], a {type(layer).__name__}, has no attention that is known")
        yield layer.register_forward_pre_hook(before, with_kwargs=True)
        yield attention.register_forward_hook(_changed(lambda y: write("attention", y)))
        yield mlp.register_forward_hook(_changed(lambda y: write("mlp", y)))
        yield layer.register_forward_hook(_changed(after))


def _changed(change: Any) -> Any:
    """A forward hook that changes what a module returns: a tensor, or the first of a tuple."""

    def hook(_: nn.Module, __: Any, y: Any) -> Any:
        if isinstance(y, Tensor):
            return change(y)
        return (change(y[0]), *y[1:])

    return hook


def _check_sum(parts: list[Tensor], x: Tensor, number: int) -> None:
    """Raise InputError unless a layer returned the sum of what it got and of what its parts gave."""
    off = torch.full((), torch.inf, dtype=torch.float32)
    if len(parts) == 3:
        total = torch.stack([part.to(x.device).float() for part in parts]).sum(0)
        scale = torch.stack([part.to(x.device).float().abs().amax() for part in parts]).amax()
        off = (x.float() - total).abs().amax() / scale
    if not off <= FAR * torch.finfo(x.dtype).eps:
        what = f"layers[{number}] adds to the stream what its attention and MLP do not return (a norm, or a factor)"
        raise InputError("model", f"{what}: a direction cannot be taken out of every write of this model")
