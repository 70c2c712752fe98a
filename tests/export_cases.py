"""Circuits to export, and what the steered model says: for the tests of every form of export."""

import pytest
import torch

from cna_kernels import Circuit
from cna_kernels.model import load
from cna_kernels.model.checkpoint import export
from tiny import TEXT_VOCABULARY, write_checkpoint, write_text_files

transformers = pytest.importorskip("transformers")

A = Circuit(((2, 7, 1.0), (0, 3, 0.5), (2, 8, -1.0), (2, 40, 0.25), (0, 9, 0.2)), 3, 48)
B = Circuit(((1, 11, 1.0), (2, 7, 0.5), (0, 40, 0.25)), 3, 48)
# half of its neurons get 2 - m
ALIGNED = Circuit(
    ((2, 7, 1.0), (0, 3, -0.5), (1, 8, -1.0), (2, 40, 0.25), (1, 9, 0.2), (2, 20, 1.0)), 3, 48,
    positive_mean=(-1.0, 1.0, -1.0, 2.0, -2.0, 1.0),
).aligned()  # fmt: skip
# 2, 5 and 1 neurons in a layer: ranks that differ
UNEVEN = Circuit(tuple((layer, index, 1.0) for layer, n in enumerate((2, 5, 1)) for index in range(n)), 3, 48)
IDS = torch.randint(6, TEXT_VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(1))
CASES = [((A,), (0.0,)), ((A,), (0.5,)), ((A,), (2.0,)), ((A, B), (0.0, 2.0)), ((A, B), (0.5, 3.0))]
CASES += [((UNEVEN,), (0.0,))]
CASES += [((ALIGNED,), (0.0,)), ((ALIGNED,), (0.5,)), ((ALIGNED,), (2.0,)), ((ALIGNED, B), (1.5, 2.0))]


def write_model(variant, directory):
    write_checkpoint(variant, directory, vocab_size=TEXT_VOCABULARY, max_shard_size="20KB")
    write_text_files(directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return load(directory, dtype="float32")


def theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def hooked(model, multiplied):
    """A transformers model with hooks that multiply the neurons, independent of the engine."""
    other, handles = theirs(model.directory), []
    for layer, found in multiplied.items():

        def scale(_, arguments, found=found):
            act = arguments[0].clone()
            for index, factor in found.items():
                act[..., index] *= factor
            return (act,)

        handles.append(other.model.layers[layer].mlp.down_proj.register_forward_pre_hook(scale))
    with torch.no_grad():
        return other(IDS, use_cache=False).logits


def steered(model, circuits, multipliers):
    if len(circuits) == 1:
        with model.steered(circuits[0], multipliers[0]), torch.no_grad():
            return model(IDS)
    return hooked(model, export.neuron_multipliers(circuits, multipliers))


def logits(peft_model):
    with torch.no_grad():
        return peft_model(input_ids=IDS, use_cache=False).logits
