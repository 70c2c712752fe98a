"""The hash of a model's neurons: what changes it, and what must not."""

import pytest
import torch

from cna_kernels.fingerprint import neurons_sha256, sampled_rows


@pytest.mark.parametrize(("n_rows", "rows"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (4096, [0, 1365, 2730, 4095])])
def test_sampled_rows(n_rows, rows):
    assert sampled_rows(n_rows) == rows


def test_rounding_does_not_change_the_hash_and_anything_else_does():
    layers = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    same = neurons_sha256(layers)
    assert same == neurons_sha256(layers.float()) == neurons_sha256(layers.double()) and len(same) == 64
    changed = layers.clone()
    changed[2, 3, 7] += 1
    others = [changed, layers.flip(0), layers.flip(1), layers.flip(2), layers[:2], layers[:, :3]]
    assert len({same, *map(neurons_sha256, others)}) == 1 + len(others)
