"""Rotary embedding: angles against float64 and transformers, rotation as a complex product, a length for each row."""

import math

import pytest
import torch

from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.rope import RotaryEmbedding, rotate
from tiny import LLAMA3, VARIANTS, write_checkpoint

transformers = pytest.importorskip("transformers")
ROPES = ["llama", "llama-head-dim", "llama-rope-linear", "llama-rope-llama3", "llama-rope-dynamic"]


@pytest.fixture(scope="module", params=ROPES)
def pair(request, tmp_path_factory):
    """Our rotary embedding and transformers', of one checkpoint."""
    directory = tmp_path_factory.mktemp(request.param)
    theirs = write_checkpoint(request.param, directory)
    return RotaryEmbedding(read_config(directory)), theirs.model.rotary_emb


@pytest.mark.parametrize("length", [1, 16, 20, 50])
def test_angles_equal_transformers(pair, length):
    """The checkpoint with dynamic scaling has 16 positions, so longer lengths are scaled."""
    ours, theirs = pair
    positions = torch.arange(length)[None]
    cos, sin = ours(positions, torch.tensor([length]), torch.float32)
    expected = theirs(torch.zeros(1, length, 4), positions)
    assert (cos[:, 0] - expected[0]).abs().max() < 1e-5 and (sin[:, 0] - expected[1]).abs().max() < 1e-5


def frequency(kind, pair_number, dim, length):
    """The frequency of one pair of coordinates, by the formulas as their papers write them."""
    theta = 10_000.0
    if kind == "llama-rope-dynamic":
        theta *= (8.0 * max(length, 16) / 16 - 7.0) ** (dim / (dim - 2))
    plain = theta ** (-2 * pair_number / dim)
    if kind == "llama-rope-linear":
        return plain / 2
    if kind != "llama-rope-llama3":
        return plain
    wavelength = 2 * math.pi / plain
    context = LLAMA3["original_max_position_embeddings"]
    if wavelength < context / 4.0:
        return plain
    if wavelength > context / 1.0:
        return plain / 8.0
    smooth = (context / wavelength - 1.0) / (4.0 - 1.0)
    return (1 - smooth) * plain / 8.0 + smooth * plain


@pytest.mark.parametrize("kind", ROPES)
def test_rotation_is_a_complex_product(kind, tmp_path):
    """A row's coordinates d and d + D/2 are one number, turned by position * frequency; rows have their own lengths."""
    write_checkpoint(kind, tmp_path)
    rope = RotaryEmbedding(read_config(tmp_path))
    dim = VARIANTS[kind][1].get("head_dim", 8)
    positions, lengths = torch.tensor([[0, 3, 19], [7, 40, 2]]), torch.tensor([20, 41])
    x = torch.randn(2, 4, 3, dim, generator=torch.Generator().manual_seed(1))
    got = rotate(x, *rope(positions, lengths, torch.float32))
    numbers = torch.complex(x[..., : dim // 2].double(), x[..., dim // 2 :].double())
    turns = torch.tensor([[frequency(kind, d, dim, n) for d in range(dim // 2)] for n in lengths.tolist()])
    angle = positions[:, :, None].double() * turns.double()[:, None]  # [B, S, D / 2]
    turned = numbers * torch.polar(torch.ones_like(angle), angle)[:, None]
    assert (got - torch.cat([turned.real, turned.imag], -1)).abs().max() < 1e-4
    assert (got - x)[:, :, 1:].abs().max() > 0.5 and torch.equal(got[0, :, 0], x[0, :, 0]), "position 0 turns nothing"


def test_products_depend_on_the_distance_alone(pair):
    ours, _ = pair
    dim = 2 * ours.exponent.shape[0]
    q, k = torch.randn(2, 1, 1, 1, dim, generator=torch.Generator().manual_seed(2))

    def product(at, other):
        length = torch.tensor([50])
        turned = [rotate(x, *ours(torch.tensor([[n]]), length, torch.float32)) for x, n in ((q, at), (k, other))]
        return (turned[0] * turned[1]).sum().item()

    assert product(9, 4) == pytest.approx(product(35, 30), abs=1e-4)
    assert abs(product(9, 4) - product(4, 9)) > 1e-3
