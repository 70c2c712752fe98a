"""The forward pass against transformers on tiny random checkpoints of every family and variant."""

import pytest
import torch
from cna_kernels.model.config import read_config
from cna_kernels.model.weights import load_transformer, open_checkpoint

pytest.importorskip("transformers")


def load(directory, **options):
    return load_transformer(directory, read_config(directory), open_checkpoint(directory), **options)


def test_logits_equal_transformers(tiny_checkpoint):
    directory, theirs = tiny_checkpoint
    ours = load(directory)
    ids = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        got = ours(ids)
    assert expected.std() > 0.1, "a flat output would hide everything"
    assert (got - expected).abs().max() <= 1e-4
