"""Gradient attribution of neurons, for comparison: relevance propagation (RelP) by PyTorch's autograd.

The relevance of a neuron is ``act * d(logit difference) / d act``, summed over the tokens of a prompt, with three rules
in the backward pass: the divisor of every normalisation and the sigmoid inside SiLU are constants, and a product of two
activations, gate and up, hands half of its relevance to each. Source: F. Rezaei Jafari et al., RelP: faithful and
efficient circuit discovery via relevance patching, arXiv 2508.21258; the rules are those of layer-wise relevance
propagation. Attention is differentiated as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cna_kernels.errors import InputError

from ..discovery.packing import TokenPrompt
from ..generate import pad
from ..transformer import MLP, Edit, RMSNorm, Steering, Transformer

DIFFERENCE = 0.05  # least difference between both sides' shares of answers that a token begins
BATCH = 16  # prompts of one forward and backward pass, whose activations are kept


class _Norm(RMSNorm):
    """RMSNorm with a divisor that has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps).detach()
        return self.weight * wide.to(x.dtype)


class _Mlp(MLP):
    """The MLP with the rules for SiLU and for the product. ``act`` ``[T, N]`` keeps its gradient."""

    act: Tensor | None = None

    def forward(self, x: Tensor, **extras) -> Tensor:
        gate, up = self.gate_up_proj(x.flatten(0, 1)).chunk(2, -1)
        gate = gate * torch.sigmoid(gate).detach()
        self.act = act = (gate * up.detach() + gate.detach() * up) / 2
        act.retain_grad()
        return self.down_proj(act).view_as(x)


class _Start(Edit):
    """Makes gradients start at the embedding: the weights have none."""

    def write(self, layer, part, y):
        return y.detach().requires_grad_() if part == "embedding" else y


def with_rules(transformer: Transformer) -> Transformer:
    """Return a transformer that shares the weights, and whose backward pass follows the rules."""
    shared = {id(parameter): parameter for parameter in transformer.parameters()}
    twin = copy.deepcopy(transformer, shared)
    for module in twin.modules():
        module.__class__ = _RULES.get(type(module), type(module))
    return twin


_RULES: dict[type[nn.Module], type[nn.Module]] = {RMSNorm: _Norm, MLP: _Mlp}


def first_tokens(
    transformer: Transformer, positive: Sequence[TokenPrompt], negative: Sequence[TokenPrompt], *, batch: int = BATCH
) -> tuple[list[int], list[int]]:
    """Return (targets, counterfactuals): tokens that begin clearly more, or fewer, positive answers than negative ones.

    "Clearly" means that the shares of the two sides' answers differ by DIFFERENCE. Raises InputError where there is no
    target or no counterfactual.
    """
    shares = []
    for prompts in (positive, negative):
        ordered, first = sorted(prompts, key=lambda prompt: len(prompt.ids)), Counter[int]()
        for start in range(0, len(ordered), batch):
            input_ids, lengths = pad([prompt.ids for prompt in ordered[start : start + batch]], transformer.device)
            with torch.inference_mode():
                hidden = transformer.hidden(input_ids, lengths=lengths)
                rows = torch.arange(len(lengths), dtype=torch.int64, device=transformer.device)
                logits = transformer.logits(hidden[rows, lengths - 1]).float()
            if not torch.isfinite(logits).all():
                raise InputError(ordered[start].place, "its logits, or those of a prompt beside it, are not finite")
            first.update(logits.argmax(-1).tolist())
        shares.append(Counter({token: count / len(prompts) for token, count in first.items()}))
    every = sorted(set(shares[0]) | set(shares[1]))
    targets = [token for token in every if shares[0][token] >= shares[1][token] + DIFFERENCE]
    counterfactuals = [token for token in every if shares[1][token] >= shares[0][token] + DIFFERENCE]
    if not targets or not counterfactuals:
        raise InputError("positive", "answers begin like those of the negative prompts: no token tells them apart")
    return targets, counterfactuals


def relevance(
    transformer: Transformer,
    prompts: Sequence[TokenPrompt],
    targets: Sequence[int],
    counterfactuals: Sequence[int],
    *,
    batch: int = BATCH,
) -> Tensor:
    """Return the mean relevance of every neuron over the prompts, fp64 ``[L, N]``; positive if it favours the targets.

    The quantity explained is log(sum of the targets' probabilities / sum of the counterfactuals' probabilities) of the
    token after each prompt. For one target and one counterfactual it is the difference of their logits.

    Args:
        targets, counterfactuals: token ids, at least one each.
    """
    if transformer.rank is not None:
        raise InputError("relevance", "needs gradients: a whole model in one process, not one that ranks share")
    for name, ids in (("targets", targets), ("counterfactuals", counterfactuals)):
        if not ids:
            raise InputError(name, "expected at least one token")
    twin, config = with_rules(transformer), transformer.config
    device = transformer.device
    total = torch.zeros(config.num_hidden_layers, config.intermediate_size, dtype=torch.float64)
    wanted, against = (torch.tensor(list(ids), dtype=torch.int64, device=device) for ids in (targets, counterfactuals))
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
    for start in range(0, len(ordered), batch):
        input_ids, lengths = pad([prompt.ids for prompt in ordered[start : start + batch]], device)
        with torch.enable_grad():
            hidden = twin.hidden(input_ids, lengths=lengths, steer=Steering(None, None, _Start()))
            rows = torch.arange(len(lengths), dtype=torch.int64, device=device)
            logits = twin.logits(hidden[rows, lengths - 1]).float()
            metric = logits[:, wanted].logsumexp(-1) - logits[:, against].logsumexp(-1)
            metric.sum().backward()
        for number, layer in enumerate(twin.layers):
            mlp = layer.mlp
            assert isinstance(mlp, _Mlp) and mlp.act is not None and mlp.act.grad is not None, "the pass above ran it"
            total[number] += (mlp.act.detach().cpu().double() * mlp.act.grad.cpu().double()).sum(0)
            mlp.act = None
    if not torch.isfinite(total).all():
        raise InputError("relevance", "is not finite")
    return total / len(prompts)
