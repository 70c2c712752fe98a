"""Tiny random transformers models of every kind that attach knows, and what steering them must give."""

import copy
import random
import warnings

import pytest
import torch
from torch import nn

from cna_kernels import Circuit, attach
from tiny import SHAPE

transformers = pytest.importorskip("transformers")

MOE = dict(head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
# name: (class stem, changes to SHAPE, the warning about layers that are not fused, or None)
MODELS = {
    "llama": ("Llama", {}, None),
    "llama-bias": ("Llama", dict(mlp_bias=True), "gate_proj has a bias, a hook or an unusual weight"),
    "qwen2": ("Qwen2", {}, None),
    "qwen3": ("Qwen3", dict(head_dim=16), None),
    "mistral": ("Mistral", dict(sliding_window=7), None),
    "gemma": ("Gemma", dict(head_dim=8), "the activation is GELUTanh"),
    "gemma2": ("Gemma2", dict(head_dim=8), "the activation is GELUTanh"),
    "gemma3": ("Gemma3", dict(head_dim=8), "the activation is GELUTanh"),
    "phi3": ("Phi3", {}, None),
    "qwen3-moe": ("Qwen3Moe", MOE, None),
    "qwen3-moe-mixed": ("Qwen3Moe", MOE | dict(mlp_only_layers=[1]), None),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2), None),
}
DENSE = [name for name in MODELS if "moe" not in name and name != "mixtral"]
L = SHAPE["num_hidden_layers"]


class Int8Linear(nn.Module):
    """A quantised layer of the usual kind: int8 weights, one scale a row, its own forward."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def make(name, dtype=torch.float32, seed=3, **changes):
    stem, of_variant, _ = MODELS[name]
    config = getattr(transformers, "Gemma3TextConfig" if stem == "Gemma3" else f"{stem}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(config(**(SHAPE | of_variant | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 and "gemma" not in name else 0.0, 0.2)
    return model.to(dtype).eval()


def quietly(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attach(model, **options)


def ids_of(n_rows, n_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE["vocab_size"], (n_rows, n_tokens), generator=generator)


def random_circuit(engine, seed, size=24):
    rng = random.Random(seed)
    places = [(layer, index) for layer in range(engine.n_layers) for index in range(engine.widths[layer])]
    return Circuit(tuple((*pair, 1.0) for pair in rng.sample(places, size)), engine.n_layers, engine.n_neurons)


@torch.no_grad()
def logits(model, ids, **more):
    return model(ids, **more).logits


@torch.no_grad()
def with_scaled_columns(model, circuit, multiplier, run):
    """What ``run`` gives on a copy whose down_proj columns are multiplied: the definition, without our code."""
    edited = copy.deepcopy(model)
    for layer, members in circuit.by_layer().items():
        mlp = edited.get_decoder().layers[layer].mlp
        weight = mlp.experts.down_proj if hasattr(mlp, "experts") else mlp.down_proj.weight
        for index in members:
            if weight.dim() == 3:
                weight[index // weight.shape[2], :, index % weight.shape[2]] *= multiplier
            else:
                weight[:, index] *= multiplier
    return run(edited)


def hooked(model, circuit, multiplier, run, rows=slice(None)):
    """What ``run`` gives with a hook on every down_proj that multiplies the circuit's neurons in these rows."""
    handles = []
    for layer, members in circuit.by_layer().items():

        def scale(_, arguments, members=members):
            act = arguments[0].clone()
            act[rows, ..., members] *= multiplier
            return (act,)

        handles.append(model.get_decoder().layers[layer].mlp.down_proj.register_forward_pre_hook(scale))
    try:
        return run(model)
    finally:
        for handle in handles:
            handle.remove()


def assert_steered(got, expected, plain, tolerance=1e-5):
    """``got`` equals ``expected`` up to the tolerance, and ``expected`` differs much more from ``plain``."""
    scale = plain.abs().max()
    assert (got - expected).abs().max() <= tolerance * scale
    assert (expected - plain).abs().max() > 1e-2 * scale


def assert_steered_as_hooks(model, engine, ids, plain, tolerance=1e-5):
    """The attached, steered model gives the same as the detached model with hooks."""
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [-2.0])
    engine.rows(0)
    got = logits(model, ids)
    engine.detach()
    assert_steered(got, hooked(model, circuit, -2.0, lambda m: logits(m, ids)), plain, tolerance)
