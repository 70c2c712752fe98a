"""Which MLPs are taken: those whose activation is the input of ``down_proj``, in every layer."""

import pytest
from fakes import L, LlamaMLP, Model, N
from torch import nn

from cna_kernels.vllm.hooks import Changed
from cna_kernels.vllm.mlps import find


class Chained(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class Doubled(LlamaMLP):
    def forward(self, x):
        x, _ = self.gate_up_proj(x)
        return self.down_proj(self.act_fn(x) * 2)[0]


class Normed(LlamaMLP):
    def forward(self, x):
        x, _ = self.gate_up_proj(x)
        return self.down_proj(self.norm(self.act_fn(x)))[0]


class Experts(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0] + self.down_proj(self.act_fn(x))[0]


class Skipping(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.gate_up_proj(x)[0])[0]


def with_mlps(*kinds):
    model = Model()
    for layer, kind in zip(model.layers, kinds, strict=True):
        if kind is not None:
            layer.mlp = kind()
    return model


@pytest.mark.parametrize("kind", [LlamaMLP, Chained])
def test_known_forms_are_found(kind):
    found = find(with_mlps(kind, kind, None), range(L), N)
    assert sorted(found) == [0, 1, 2] and all((mlp.low, mlp.n) == (0, N) for mlp in found.values())


@pytest.mark.parametrize("kind", [Doubled, Normed, Experts, Skipping, nn.Identity])
def test_other_forms_are_refused(kind):
    with pytest.raises(Changed, match="layers 1 have no gated MLP of 70 neurons with act_fn and down_proj"):
        find(with_mlps(None, kind, None), range(L), N)


def test_a_forward_of_its_own_is_refused():
    model = Model()
    model.layers[2].mlp.forward = lambda x: x
    with pytest.raises(Changed, match="layers 2 have"):
        find(model, range(L), N)
    assert sorted(find(model, range(2), N)) == [0, 1], "a rank of a pipeline has some layers alone"


def test_widths_and_layers_must_be_the_models():
    with pytest.raises(Changed, match="layers 0, 1, 2 have no gated MLP of 71"):
        find(Model(), range(L), 71)
    twice = nn.ModuleDict({"text": Model(), "draft": Model()})
    with pytest.raises(Changed, match="layer 0 has two MLPs"):
        find(twice, range(L), N)
