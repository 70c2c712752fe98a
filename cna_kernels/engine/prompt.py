"""Where the prompt of the running ``generate`` ends. ``generate`` knows, and the calls of the decoder do not say it.

A column is a place in the cache, or in the whole sequence where there is no cache: padding has columns, too. Outside
``generate`` a call on an empty cache is a prompt, and one token on a cache that holds tokens belongs to the answer.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

MORE = "give `start` and `stop` instead, which are positions"
BEFORE = "_cna_generate"  # an attribute of a model whose methods were replaced: by name its own one before, or None


class Prompt:
    """The prompt of the running ``generate``.

    Attributes:
        n_tokens: the columns of the prompt as ``generate`` got it; 0 where only the first call of the decoder shows
            them, None outside ``generate``.
        whole: whether these count what the cache holds already.
        end: the first column behind the prompt; None before the first call of the decoder.
        cache: the cache of that call. A call on another cache is not ``generate``'s own (guidance, a processor).
        inner: how many calls of ``generate`` run within another to draft for it: they have the same prompt.
        columns: of the last call without a cache that may be ``generate``'s own: each has one more.
        is_next: whether the call at hand may be such a one.
        guided: whether ``generate`` calls the model for a second prompt.
        column: ``end`` on the device, ``[1]`` int64, for graphs.
        models: the models whose ``generate`` says when it runs.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.n_tokens: int | None = None
        self.end: int | None = None
        self.cache: Any = None
        self.whole = self.guided = self.is_next = False
        self.inner = self.columns = 0
        self.models: list[nn.Module] = []

    def begin_call(self, n_tokens: int, past: Any) -> None:
        """Find ``end`` in the first call of the decoder, of ``n_tokens`` columns."""
        if self.n_tokens is None:
            return
        if past is None:
            self.is_next = self.end is None or n_tokens == self.columns + 1
            self.columns = n_tokens if self.is_next else self.columns
        if self.end is not None:
            return
        seen, end = int(seen_by(past)), self.n_tokens or n_tokens
        if seen and n_tokens >= end and not self.whole:
            end += seen  # the cache holds tokens that the prompt does not repeat
        self.end, self.cache = end, past
        self.column.fill_(end)

    def leave(self, before: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """Be outside ``generate``, or go back to the prompt ``before``. Return what the prompt was, as such."""
        left = self.n_tokens, self.end, self.cache, self.whole, self.guided, self.inner, self.columns
        back = (None, None, None, False, False, 0, 0) if before is None else before
        self.n_tokens, self.end, self.cache, self.whole, self.guided, self.inner, self.columns = back
        if self.end is not None:
            self.column.fill_(self.end)
        return left

    def goes_on(self, n_tokens: int, past: Any) -> bool:
        """Whether the prompt has more tokens than those up to the end of this call."""
        return self.end is not None and int(seen_by(past)) + n_tokens < self.end

    def tokens(self, n_tokens: int, device: torch.device, call: dict[str, Any]) -> Tensor:
        """Which tokens of a call belong to the prompt, ``[1, S]`` bool. ``call``: the decoder's arguments by name.

        Raises:
            InputError: nothing says where the prompt ends.
        """
        past = call.get("past_key_values")
        seen = seen_by(past)
        column = torch.arange(n_tokens, dtype=torch.int64, device=device)
        column = column + (seen.to(device) if isinstance(seen, Tensor) else seen)
        if self.n_tokens is not None and (self.inner or past is self.cache):
            if past is None and not self.inner and (self.guided or not self.is_next):
                raise InputError("phase", f"without a cache, whose prompt a call has cannot be known; {MORE}")
            return (column < self.column.to(device))[None]
        if past is None and not call.get("use_cache"):
            raise InputError("phase", f"a call without a cache does not say where its prompt ends; {MORE}")
        if n_tokens > 1 and isinstance(seen, Tensor) and torch.compiler.is_compiling():
            raise InputError("phase", f"compiled, {n_tokens} tokens on a static cache may be prompt or answer; {MORE}")
        if n_tokens > 1 and int(seen):
            raise InputError("phase", f"{n_tokens} tokens on a cache of {int(seen)} may be prompt or answer; {MORE}")
        return (column < 1)[None] if n_tokens == 1 else torch.ones_like(column, dtype=torch.bool)[None]

    def put_on(self, model: nn.Module, decoder: nn.Module, engine_of: Callable[[nn.Module], Any]) -> None:
        """Replace ``generate`` of every model around the decoder. ``engine_of`` gives a decoder's engine, or None."""
        for module in model.modules():
            if hasattr(type(module), "_prefill") and any(part is decoder for part in module.modules()):
                before: dict[str, Any] = {}
                setattr(module, BEFORE, before)
                for name, method_of in REPLACED.items():
                    if hasattr(type(module), name):
                        before[name] = module.__dict__.get(name)
                        module.__dict__[name] = types.MethodType(method_of(type(module), engine_of), module)
                self.models.append(module)

    def take_off(self) -> None:
        for module in self.models:
            for name, before in module.__dict__.pop(BEFORE, {}).items():
                current = module.__dict__.get(name)
                if not hasattr(getattr(current, "__func__", None), BEFORE):
                    continue  # something was put around it after attach, and goes on to call the model's own
                if before is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = before
        self.models = []


def _generate_of(kind: Any, engine_of: Callable[[nn.Module], Any]) -> Callable[..., Any]:
    """The ``generate`` of a class of models, which tells the engine how long the prompt is."""

    @functools.wraps(kind.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        run, prompt = _method_before(kind, self, "generate"), _prompt_of(self, engine_of)
        if prompt is None:  # a copy of the model
            return run(*args, **kwargs)
        if prompt.n_tokens is not None and getattr(kwargs.get("generation_config"), "is_assistant", False):
            prompt.inner += 1  # a model that drafts for itself
            try:
                return run(*args, **kwargs)
            finally:
                prompt.inner -= 1
        before = prompt.leave()  # of a ``generate`` that this one runs in
        prompt.n_tokens, prompt.whole = _length(self, args, kwargs)
        prompt.guided = _is_guided(self, kwargs)
        try:
            return run(*args, **kwargs)
        finally:
            prompt.leave(before)

    setattr(generate, BEFORE, True)
    return generate


def _init_continuous_batching_of(kind: Any, engine_of: Callable[[nn.Module], Any]) -> Callable[..., Any]:
    """The ``init_continuous_batching`` of a class of models, which has the engine watch the batches."""

    @functools.wraps(kind.init_continuous_batching)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        manager = _method_before(kind, self, "init_continuous_batching")(*args, **kwargs)
        engine = engine_of(self.get_decoder())
        return manager if engine is None else engine._batching.watch(manager)

    setattr(init_continuous_batching, BEFORE, True)
    return init_continuous_batching


def _generate_batch_of(kind: Any, engine_of: Callable[[nn.Module], Any]) -> Callable[..., Any]:
    """The ``generate_batch`` of a class of models, which only logs what is wrong with the requests that it adds."""

    @functools.wraps(kind.generate_batch)
    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = engine_of(self.get_decoder())
        inputs = args[0] if args else kwargs.get("inputs")
        if engine is not None and inputs:
            engine._batching.check_inputs(len(inputs))
        return _method_before(kind, self, "generate_batch")(*args, **kwargs)

    setattr(generate_batch, BEFORE, True)
    return generate_batch


REPLACED = {
    "generate": _generate_of,
    "init_continuous_batching": _init_continuous_batching_of,
    "generate_batch": _generate_batch_of,
}


def _method_before(kind: Any, model: Any, name: str) -> Callable[..., Any]:
    """The method that a model would run if it were not attached."""
    before = getattr(model, BEFORE, {}).get(name)
    return types.MethodType(getattr(kind, name), model) if before is None else before


def _prompt_of(model: Any, engine_of: Callable[[nn.Module], Any]) -> Prompt | None:
    """The prompt of the engine on a model; None where there is none, as on a copy of the model."""
    engine = engine_of(model.get_decoder())
    return None if engine is None else engine._prompt


def _length(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, bool]:
    """The columns of the prompt that ``generate`` is given, and whether they count what the cache holds already."""
    if getattr(model.config, "is_encoder_decoder", False):
        return 0, False  # they are the encoder's
    given = [kwargs.get("inputs_embeds"), args[0] if args else kwargs.get("inputs"), kwargs.get("input_ids")]
    n_tokens = next((x.shape[1] for x in given if x is not None), 1)  # of both, the embeddings go into the model
    mask: Any = kwargs.get("attention_mask")
    counts_cache = kwargs.get("past_key_values") is not None and isinstance(mask, Tensor) and mask.dim() == 2
    if counts_cache and mask.shape[1] > n_tokens:
        return mask.shape[1], True
    n_virtual = _virtual_tokens(model)
    return n_tokens + n_virtual, n_virtual > 0


def _virtual_tokens(model: Any) -> int:
    """How many tokens PEFT puts before every prompt: its model prepares the inputs of this one while it generates."""
    adapted = getattr(model.__dict__.get("prepare_inputs_for_generation"), "__self__", None)
    config: Any = getattr(adapted, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0


def _is_guided(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether ``generate`` runs a model on a prompt of another, too."""
    if any(isinstance(getattr(each, "model", None), nn.Module) for each in kwargs.get("logits_processor") or ()):
        return True
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    scale = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
    return scale is not None and scale != 1


def seen_by(past: Any) -> int | Tensor:
    """How many tokens a cache holds: a number, or a tensor of a static cache."""
    seen: int | Tensor = past.get_seq_length() if past is not None else 0
    return seen
