"""Whose code runs: forwards known by their bytecode, PyTorch's functions as they were shipped."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attach_cases import transformers
from cna_kernels.engine import forwards
from cna_kernels.engine.dense import Apart, Joined
from cna_kernels.engine.experts import Experts

MODELS = transformers.models
LlamaMLP = MODELS.llama.modeling_llama.LlamaMLP
MixtralExperts = MODELS.mixtral.modeling_mixtral.MixtralExperts
MINE = torch.nn.functional


class Renamed:
    """The same formula in other words."""

    def forward(self, hidden):
        """With a docstring."""
        result = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return result


class Other:
    def clamped(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-1, 1))

    def swapped(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    def scaled(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2

    def optional(self, x, y=None):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    @functools.wraps(LlamaMLP.forward)
    def wrapped(self, x):
        return self.clamped(x)


def other_globals(function, **names):
    return types.FunctionType(function.__code__, {**function.__globals__, **names}, "forward")


@functools.wraps(MixtralExperts.forward)
def wrapped_experts(self, *args, **kwargs):
    return 2 * MixtralExperts.forward(self, *args, **kwargs)


KNOWN = [
    (Apart, LlamaMLP.forward, True),
    (Apart, MODELS.qwen2.modeling_qwen2.Qwen2MLP.forward, True),
    (Apart, MODELS.gemma.modeling_gemma.GemmaMLP.forward, True),
    (Apart, Renamed.forward, True),
    (Joined, MODELS.phi3.modeling_phi3.Phi3MLP.forward, True),
    (Experts, MixtralExperts.forward, True),
    (Experts, MODELS.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts.forward, True),
    *((Apart, function, False) for name, function in vars(Other).items() if callable(function)),
    (Apart, MODELS.phi3.modeling_phi3.Phi3MLP.forward, False),
    (Joined, LlamaMLP.forward, False),
    (Apart, LlamaMLP(transformers.LlamaConfig(hidden_size=32, intermediate_size=8)).forward, False),  # of one module
    (Apart, functools.partial(LlamaMLP.forward), False),
    (Apart, len, False),
    (Experts, wrapped_experts, False),
    (Experts, MixtralExperts.forward.__wrapped__, False),
    (Experts, LlamaMLP.forward, False),
]


@pytest.mark.parametrize(("kind", "function", "known"), KNOWN)
def test_a_forward_is_known_by_its_code(kind, function, known):
    assert kind.knows(function) is known


def test_names_of_other_modules_are_not_taken_for_torch():
    assert forwards.is_one_of(nn.Linear.forward, forwards._linear)
    assert not forwards.is_one_of(other_globals(nn.Linear.forward, F=types.SimpleNamespace()), forwards._linear)


def test_torch_is_as_it_was_shipped():
    assert forwards._AS_SHIPPED and not forwards.others_watch()
    assert nn.SiLU.forward in forwards.SILUS
    with torch.device("cpu"):
        assert not forwards.others_watch(), "the mode of a default device changes no result"


def test_a_function_on_file_is_that_before_a_patch(monkeypatch):
    assert forwards.is_in_file(F.silu, "torch.nn.functional", "silu")
    monkeypatch.setattr(F, "silu", lambda x, inplace=False: x)
    assert not forwards.is_in_file(F.silu, "torch.nn.functional", "silu") and forwards.others_watch()
    assert forwards.in_file("torch.nn.functional", "no such function") is None
    assert forwards.in_file("no_such_module", "f") is None
