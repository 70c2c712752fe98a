"""Relevance propagation: against a closed form in float64, and against transformers patched rule by rule."""

import types

import pytest
import torch

from cna_kernels import InputError
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.evaluation.relp import relevance
from cna_kernels.model.prompts.files import PromptSet
from tiny import SHAPE, random_prompts, write_checkpoint

pytest.importorskip("transformers")
L = SHAPE["num_hidden_layers"]


@pytest.fixture(scope="module", params=["llama", "qwen3-tied", "qwen2-sliding"])
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    theirs = write_checkpoint(request.param, directory)
    return load_transformer(directory, read_config(directory), open_checkpoint(directory)), theirs


def last_layer_of(theirs, ids, targets, counterfactuals):
    """Relevance of the last layer by hand, [N] float64. With a constant divisor in the last normalisation the logits
    are linear in the layer's act. The slope of a logsumexp is the mean of its tokens' slopes by probability."""
    double = theirs.double()
    caught = []
    handles = [
        double.model.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda _, given: caught.append(given[0])),
        double.model.norm.register_forward_pre_hook(lambda _, given: caught.append(given[0])),
    ]
    with torch.no_grad():
        logits = double(torch.tensor([ids]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    act, residual = (x[0, -1] for x in caught)
    scale = double.model.norm.weight / (residual.square().mean() + double.config.rms_norm_eps).sqrt()

    def slope(tokens):
        share = logits[tokens].softmax(0)
        return ((share @ double.lm_head.weight[tokens]) * scale) @ double.model.layers[-1].mlp.down_proj.weight

    found = act * (slope(targets) - slope(counterfactuals))
    theirs.float()
    return found.detach()


@pytest.mark.parametrize(("targets", "counterfactuals"), [([11], [40]), ([11, 12, 60], [40, 5])])
def test_the_last_layer_equals_its_closed_form(pair, targets, counterfactuals):
    """In the last layer only the last token has relevance: nothing reads what the other tokens write there."""
    ours, theirs = pair
    ids = [5, 17, 3, 80, 44]
    expected = last_layer_of(theirs, ids, targets, counterfactuals)
    found = relevance(ours, [TokenPrompt(ids, "p")], targets, counterfactuals)
    assert expected.abs().max() > 0.01
    assert (found[-1] - expected).abs().max() <= 1e-4 * expected.abs().max()


def rule_by_rule(theirs, members, target, counterfactual):
    """Relevance by patching transformers: normalisation and sigmoid without gradient, half of a product to each."""
    total = torch.zeros(L, SHAPE["intermediate_size"], dtype=torch.float64)

    def norm(self, x):
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt().detach())

    def mlp(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        gate = gate * gate.sigmoid().detach()
        product = gate * up
        self.seen = product.detach() + (product - product.detach()) * 0.5  # the value, and half of the gradient
        self.seen.retain_grad()
        return self.down_proj(self.seen)

    kept = []
    for module in theirs.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") or name.endswith("MLP"):
            kept.append(module)
            module.forward = types.MethodType(norm if name.endswith("RMSNorm") else mlp, module)
    for prompt in members:
        logits = theirs(torch.tensor([prompt.ids]), use_cache=False).logits[0, -1]
        (logits[target] - logits[counterfactual]).backward()
        for number, layer in enumerate(theirs.model.layers):
            seen = layer.mlp.seen
            total[number] += (seen.detach().double() * seen.grad.double())[0].sum(0) / len(members)
    for module in kept:
        del module.forward
    theirs.zero_grad()
    return total


def test_relevance_equals_patched_transformers(pair):
    ours, theirs = pair
    for members in (random_prompts(1, 1), random_prompts(5, 2)):
        expected = rule_by_rule(theirs, members, 11, 40)
        found = relevance(ours, members, [11], [40], batch=2)
        assert expected.abs().max() > 0.05
        assert (found - expected).abs().max() <= 1e-4


def test_relevance_leaves_the_model_as_it_was(pair):
    ours, _ = pair
    before = ours(torch.tensor([[5, 6, 7]]))
    relevance(ours, random_prompts(3, 1), [11, 12], [40])
    assert torch.equal(ours(torch.tensor([[5, 6, 7]])), before)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in ours.parameters())


def test_relevance_of_a_language_model(tmp_path):
    from cna_kernels.model import load
    from tiny import write_language_model

    model = load(write_language_model(tmp_path))
    found = model.relevance("open it", "Sure", "no")
    tokens = [model.tokenizer.encode_answer(text)[:1] for text in ("Sure", "no")]
    assert torch.equal(found, relevance(model.transformer, model.encode(PromptSet.of(["open it"], "p")), *tokens))
    both = model.relevance(["open it", "why"], ["Sure", "Yes"], "no")
    assert both.shape == (3, 48) and not torch.equal(both, found)
    with pytest.raises(InputError, match="counterfactual: holds no token"):
        model.relevance("open it", "Sure", "")


def test_relevance_needs_tokens(pair):
    with pytest.raises(InputError, match="targets: expected at least one token"):
        relevance(pair[0], random_prompts(1, 1), [], [3])
