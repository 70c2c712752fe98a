"""A Llama / Qwen / Mistral forward pass in plain PyTorch, its MLPs on the ops of ``cna_kernels``.

Parameters carry the checkpoint's names without the leading ``model.``; only ``gate_proj`` and ``up_proj`` are joined
into ``gate_up_proj``. B sequences of S tokens, right-padded: causal attention never looks at padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cna_kernels import ops
from cna_kernels.blocks import BlockWeight
from cna_kernels.circuit import Circuit
from cna_kernels.scale import make_scale
from cna_kernels.steering import SteeringTable
from cna_kernels.sums import ActivationSums
from cna_kernels.warm_up import blank_extras, warm_up

from . import decode
from .checkpoint.config import ModelConfig
from .kv_cache import KVCache
from .prefill import prefill
from .rope import RotaryEmbedding, rotate
from .steering import Edit, Steer, Steering, Tap  # noqa: F401  # Steer: their place before 0.2


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()  # rounded to x's dtype twice: before the weight and after it
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Linear(nn.Linear):
    """``torch.nn.Linear`` on ``ops.linear``, which uses the CPU engine on CPUs.

    The weight may be a BlockWeight; that of ``gate_up_proj`` a pair of them.
    """

    weight: Any  # Parameter, BlockWeight or (BlockWeight, BlockWeight)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if isinstance(self.weight, tuple):
            y = torch.cat([ops.linear(rows, weight) for weight in self.weight], dim=-1)
            y = y if self.bias is None else y + self.bias
        else:
            y = ops.linear(rows, self.weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


class Embedding(nn.Embedding):
    """``torch.nn.Embedding`` that draws no weights on the meta device: PyTorch would import its compiler to do so.

    The weight may be a BlockWeight, whose rows become ``row_dtype``.
    """

    weight: Any  # Parameter or BlockWeight
    row_dtype = torch.float32

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.weight, BlockWeight):
            return self.weight.rows(ids, self.row_dtype)
        return super().forward(ids)

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.o_bias)
        self.q_norm: nn.Module
        self.k_norm: nn.Module
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, cos, sin, attend, rows=None) -> Tensor:
        """Return ``[B, S, H]``; with ``rows`` only these tokens have queries, and the result is ``[B, rows, H]``.

        ``attend(layer, query, key, value)`` computes the attention: ``[B, heads, S, D]`` each, the result like query.
        """
        asking = x, cos, sin
        if rows is not None:
            asking = x[:, rows], cos[..., rows, :], sin[..., rows, :]
        query = rotate(self.q_norm(_heads(self.q_proj(asking[0]), self.head_dim)), *asking[1:])
        key = rotate(self.k_norm(_heads(self.k_proj(x), self.head_dim)), cos, sin)
        value = _heads(self.v_proj(x), self.head_dim)
        y = attend(self.layer, query, key, value)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """``[B, S, heads * D]`` as ``[B, heads, S, D]``."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, **extras) -> Tensor:
        if self.down_proj.bias is not None:
            gate, up = self.gate_up_proj(x.flatten(0, 1)).chunk(2, -1)
            return self.down_proj(ops.swiglu(gate, up, **extras)).view_as(x)
        y = ops.gated_mlp(x.flatten(0, 1), self.gate_up_proj.weight, self.down_proj.weight, **extras)
        return y.view_as(x)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.number = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, rows=None, edit: Edit | None = None, **extras) -> Tensor:
        """Return ``[B, S, H]``; with ``rows`` (for a last layer) only these tokens, ``[B, rows, H]``."""
        residual = x if rows is None else x[:, rows]
        y = self.self_attn(self.input_layernorm(x), cos, sin, attend, rows)
        x = residual + (y if edit is None else edit.write(self.number, "attention", y))
        y = self.mlp(self.post_attention_layernorm(x), **extras)
        return x + y if edit is None else edit.after(self.number, x + edit.write(self.number, "mlp", y))


class Transformer(nn.Module):
    """The whole model. ``transformer(input_ids[B, S]) -> logits[B, S, V]`` is the plain call."""

    answers = True  # whether a LanguageModel asks it for logits
    n_ranks = 1  # processes that share the layers

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.layers: Sequence[Layer] = layers  # type: ignore[assignment]  # a ModuleList does not say what it holds
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def rank(self) -> int | None:
        """This process's number among the processes that share the layers; None here, see ParallelTransformer."""
        return None

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, and of all weights that do not lie in blocks."""
        return self.norm.weight.dtype

    def n_weights(self) -> int:
        """The number of weights, those in blocks among them."""
        in_blocks = sum(math.prod(weight.shape) for weight in self.block_weights())
        return in_blocks + sum(weight.numel() for weight in self.parameters())

    def block_weights(self) -> Iterator[BlockWeight]:
        """Yield the weights that lie in the blocks of a GGUF file."""
        for module in self.modules():
            weight = getattr(module, "weight", None)
            for each in weight if isinstance(weight, tuple) else (weight,):
                if isinstance(each, BlockWeight):
                    yield each

    def blocks(self) -> Iterator[list[Layer]]:
        """Yield the layers, in their order, in lists that are in memory together: here one list of all layers."""
        yield list(self.layers)

    def own_sums(self, sums: ActivationSums, *_):
        """A context with the sums that passes add to: here ``sums`` itself, as this process has all neurons."""
        return nullcontext(sums)

    def new_table(self, circuits: Sequence[Circuit], multipliers: Sequence[float]) -> SteeringTable:
        """Circuits at their multipliers on this model's device, for a :class:`Steering`."""
        shape = self.config.num_hidden_layers, self.config.intermediate_size
        return SteeringTable(circuits, multipliers, *shape, self.device)

    def down_columns(self, layer: int, index: Sequence[int]) -> Tensor:
        """What neurons of a layer write at activation 1: their columns of ``down_proj``, ``[H, k]`` fp32."""
        weight = self.layers[layer].mlp.down_proj.weight
        columns = weight.columns(list(index)) if isinstance(weight, BlockWeight) else weight[:, list(index)]
        return columns.float()

    def cache_bytes(self, batch: int, length: int) -> int:
        """The bytes that keys and values of ``batch`` sequences of ``length`` tokens take."""
        config = self.config
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch * length
        return numbers * self.dtype.itemsize

    def new_cache(self, batch: int, length: int) -> KVCache:
        """Room for the keys and values of ``batch`` sequences of ``length`` tokens."""
        return KVCache(self.config, batch, length, self.dtype, self.device)

    def begin(
        self, input_ids: Tensor, lengths: Tensor, cache_length: int, steer: Steering | None = None
    ) -> tuple[Tensor, KVCache]:
        """Run prompts, ``[B, S]`` right-padded; return their last tokens' hidden states ``[B, H]`` and the cache.

        Args:
            lengths: ``[B]`` int64, the tokens of each prompt.
            cache_length: tokens that the longest row may come to have.
        """
        return prefill(self, input_ids, lengths, cache_length, steer)

    def step(self, tokens: Tensor, lengths: Tensor, cache: KVCache, steer: Steering | None = None) -> Tensor:
        """Decode one token of each row, ``[B]``; return the hidden states ``[B, H]``.

        Args:
            lengths: ``[B]`` int64, the tokens of each row with this one. A row that has outgrown the cache writes over
                the cache's last place: its answer has ended, and nobody reads what it computes.
        """
        positions = (lengths - 1).clamp(max=cache.keys.shape[3] - 1)[:, None]
        return self.hidden(tokens[:, None], lengths=lengths, positions=positions, cache=cache, steer=steer)[:, 0]

    def forward(self, input_ids: Tensor, *, tap: Tap | None = None, steer: Steering | None = None) -> Tensor:
        """Return logits ``[B, S, V]`` for whole sequences."""
        return self.logits(self.hidden(input_ids, tap=tap, steer=steer))

    def warm_up(self, longest: int, *, n_columns: int = 2, squares: bool = False) -> list[int]:
        """Compile the kernels that the MLPs launch for up to ``longest`` tokens: plain, steered, and with sums.

        Returns the numbers of tokens that the MLP was called with; an empty list where nothing is compiled.
        """
        mlp = self.layers[0].mlp
        w_gate_up, w_down = mlp.gate_up_proj.weight, mlp.down_proj.weight
        if isinstance(w_down, BlockWeight):  # on a CPU
            return []
        n_neurons, device = w_down.shape[1], w_down.device
        scale = make_scale([{}], n_neurons, device)
        called = set()
        for given in (dict(), dict(scale=scale), dict(n_columns=n_columns, squares=squares)):
            called.update(
                warm_up(
                    "gated_mlp",
                    lambda T: (w_gate_up.new_empty(T, w_gate_up.shape[1]), w_gate_up, None, w_down),
                    partial(blank_extras, n_neurons=n_neurons, device=device, **given),
                    longest,
                )
            )
        return sorted(called)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        tap: Tap | None = None,
        steer: Steering | None = None,
    ) -> Tensor:
        """Return the final normalised hidden states ``[B, S, H]``, without the vocabulary projection.

        Args:
            input_ids: ``[B, S]`` int64.
            lengths: ``[B]`` int64, tokens of each row up to and with this call; default: no padding.
            positions: ``[B, S]`` int64; default 0..S-1. Calls that continue a cache must pass them.
            cache: where keys and values are kept. The first call on a cache passes the prompts.
        """
        batch, n_tokens = input_ids.shape
        starts_here = positions is None
        if positions is None:
            positions = torch.arange(n_tokens, dtype=torch.int64, device=input_ids.device).expand(batch, n_tokens)
        if lengths is None:
            lengths = positions[:, -1] + 1
        if cache is not None:
            cache.used = min(cache.used + n_tokens, cache.keys.shape[3])
        extras: dict[str, Any] = {}
        if tap is not None:
            extras["token_weight"] = tap.token_weight
        table, row_circuit, edit = (None, None, None) if steer is None else (steer.table, steer.row_circuit, steer.edit)
        if row_circuit is not None and n_tokens > 1:
            row_circuit = row_circuit.repeat_interleave(n_tokens)  # [T]

        x = self.embed_tokens(input_ids)  # [B, S, H]
        if edit is not None:
            x = edit.write(-1, "embedding", x)
        cos, sin = self.rotary(positions, lengths, x.dtype)
        if n_tokens == 1 and cache is not None and edit is None and decode.serves(self, batch):
            return cache.step_of(self)(x, cos, sin, positions, tap, table, row_circuit)
        n_keys = n_tokens if cache is None else cache.used
        masks = {window: _mask(positions, n_keys, window, starts_here) for window in set(self.config.sliding_windows)}
        for number, layer in enumerate(self.layers):
            if tap is not None:
                extras |= tap.sums.layer(number)
            if table is not None:
                extras |= {"scale": table.layer(number), "row_circuit": row_circuit}
            mask = masks[self.config.sliding_windows[number]]
            x = layer(x, cos, sin, partial(_attend, mask, cache, positions), edit=edit, **extras)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states ``[..., H]`` onto the vocabulary, ``[..., V]``."""
        output = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = ops.linear(hidden.flatten(0, -2), output.weight)
        return logits.view(*hidden.shape[:-1], logits.shape[-1])


def _attend(mask, cache, positions, layer, query, key, value) -> Tensor:
    """Attention within whole sequences; with a cache, of new tokens to themselves and to the tokens in the cache."""
    if cache is not None:
        key, value = cache.update(layer, positions, key, value)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)


def _mask(positions: Tensor, n_keys: int, window: int | None, starts_here: bool) -> Tensor | None:
    """Return ``[B, 1, S, n_keys]`` bool, True where a query may look; None stands for plain causal attention."""
    if starts_here and (window is None or window >= n_keys):
        return None
    key = torch.arange(n_keys, dtype=torch.int64, device=positions.device)
    query = positions[:, None, :, None]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    return allowed
