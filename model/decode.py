"""A step of decoding in one call of the CPU engine: one token of every sequence through all layers, ``cna_decode``.

The plain forward of ``transformer.py`` is the definition, and serves all that this does not: other devices, several
tokens of a sequence, edits of the stream, biases of the MLP, a rank's part of a model, gradients, onlookers such as
profilers. ``CNA_PLAN=decode=torch`` turns the step off.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cna_kernels import backends, ops, plans
from cna_kernels.blocks import BlockWeight
from cna_kernels.cpu import library, plan, typed
from cna_kernels.extras import Extras

if TYPE_CHECKING:
    from .kv_cache import KVCache
    from .steering import Tap
    from .transformer import Transformer


def serves(transformer: Transformer, batch: int) -> bool:
    """Whether the CPU engine runs steps of ``batch`` sequences."""
    if transformer.rank is not None:  # the ranks add their summands in the middle of every layer
        return False
    if transformer.device.type != "cpu" or transformer.config.mlp_bias or torch.is_grad_enabled() or ops.is_observed():
        return False
    if backends.name_for(transformer.device) != "cpu" or not is_planned():
        return False
    if plans.override("decode") == "csrc":
        return True
    in_blocks = isinstance(transformer.layers[0].mlp.down_proj.weight, BlockWeight)
    return in_blocks or plan.choose("linear", batch, transformer.dtype).name == "csrc"


def is_planned() -> bool:
    """Whether CNA_PLAN leaves the step on: it names it, or asks nothing of PyTorch. Raises InputError."""
    return plans.override("decode") == "csrc" or "torch" not in plans.asked().values()


class DecodeStep:
    """Steps on one cache. It holds the addresses of weights and cache, which must stay where they are."""

    def __init__(self, transformer: Transformer, cache: KVCache):
        config, dtype = transformer.config, transformer.dtype
        self.name, self.function = typed.function("decode", dtype)
        self.keys, self.values, self.norm = cache.keys, cache.values, transformer.norm.weight
        layers = (library.Layer * config.num_hidden_layers)()
        for number, (layer, module) in enumerate(zip(layers, transformer.layers, strict=True)):
            attention, mlp = module.self_attn, module.mlp
            gate_up = mlp.gate_up_proj.weight
            gate, up = gate_up if isinstance(gate_up, tuple) else gate_up.chunk(2)
            weights: dict[str, Any] = dict(
                w_q=attention.q_proj.weight, w_k=attention.k_proj.weight, w_v=attention.v_proj.weight,
                w_o=attention.o_proj.weight, w_gate=gate, w_up=up, w_down=mlp.down_proj.weight,
            )  # fmt: skip
            vectors: dict[str, Any] = dict(
                input_norm=module.input_layernorm.weight, post_norm=module.post_attention_layernorm.weight,
                q_norm=getattr(attention.q_norm, "weight", None), k_norm=getattr(attention.k_norm, "weight", None),
                b_q=attention.q_proj.bias, b_k=attention.k_proj.bias, b_v=attention.v_proj.bias,
                b_o=attention.o_proj.bias, keys=cache.keys[number], values=cache.values[number],
            )  # fmt: skip
            for field, weight in weights.items():
                setattr(layer, field, library.Weight.from_buffer_copy(typed.describer(weight)(weight)))
            for field, vector in vectors.items():
                setattr(layer, field, None if vector is None else vector.data_ptr())
            layer.window = config.sliding_windows[number] or 0
        self.layers = layers
        self.made: tuple[Any, Any, Any, np.ndarray] | None = None  # of _extras
        _, _, _, length, head_dim = cache.keys.shape
        self.decoder = library.Decoder(
            version=library.ABI_VERSION, layers=ctypes.addressof(layers), norm=self.norm.data_ptr(),
            n_layers=config.num_hidden_layers, H=config.hidden_size, N=config.intermediate_size,
            n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads, D=head_dim, length=length,
            cache_row=cache.keys.stride(1), cache_head=cache.keys.stride(2), eps=config.rms_norm_eps,
        )  # fmt: skip

    def fits(self, cache: KVCache) -> bool:
        return self.keys is cache.keys and self.values is cache.values

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, tap: Tap | None, table: Any, row_circuit: Any
    ) -> Tensor:
        """Return the normed stream ``[B, 1, H]``.

        Args:
            x: ``[B, 1, H]``; cos, sin: ``[B, 1, 1, D]``; positions: ``[B, 1]`` int64.
            tap, table, row_circuit: what is summed and steered, as in ``Transformer.hidden``.
        """
        batch, _, hidden = x.shape
        x, positions = x.contiguous(), positions.contiguous()
        cos, sin = cos.expand(batch, 1, 1, -1).contiguous(), sin.expand(batch, 1, 1, -1).contiguous()
        out = torch.empty_like(x)
        extras = self._extras(tap, table, row_circuit)
        status = self.function(
            out.data_ptr(), x.data_ptr(), ctypes.addressof(self.decoder), positions.data_ptr(), cos.data_ptr(),
            sin.data_ptr(), extras, batch, hidden, hidden, cos.shape[-1], typed.threads(),
        )  # fmt: skip
        library.check(self.name, status)
        return out

    def _extras(self, tap: Tap | None, table: Any, row_circuit: Any) -> bytes | None:
        """``cna_extras`` of every layer: made once for sums and a table, whose tensors stay where they are."""
        if tap is None and table is None:
            return None
        sums, token_weight = (None, None) if tap is None else (tap.sums, tap.token_weight)
        given: list[Any] = [None if x is None else (x.shape, x.stride(), x.dtype) for x in (token_weight, row_circuit)]
        given.append(None if sums is None else sums.act_sum.data_ptr())
        if self.made is None or self.made[0] is not sums or self.made[1] is not table or self.made[2] != given:
            self.made = sums, table, given, self._extras_of(tap, table, row_circuit)
        extras = self.made[3]
        for field, x in (("token_weight", token_weight), ("row_circuit", row_circuit)):
            if x is not None and extras[field][0]:
                extras[field] = x.data_ptr()
        return extras.tobytes()

    def _extras_of(self, tap: Tap | None, table: Any, row_circuit: Any) -> np.ndarray:
        from cna_kernels.cpu.ops import packer

        found = []
        for number in range(len(self.layers)):
            given: dict[str, Any] = {}
            if tap is not None:
                given |= {"token_weight": tap.token_weight, **tap.sums.layer(number)}
            if table is not None:
                offsets, index, value = table.layer(number)
                given |= dict(scale_offsets=offsets, scale_index=index, scale_value=value, row_circuit=row_circuit)
            extras = Extras(**given)
            found.append(packer(extras)(*extras) or bytes(library.Extras(version=library.ABI_VERSION)))
        fields = np.dtype([(field[0], np.int64) for field in library.Extras._fields_])
        return np.frombuffer(bytearray(b"".join(found)), fields)
