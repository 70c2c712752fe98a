"""SteeringTable: many circuits, multipliers changed in place, refusals."""

import pytest
import torch

from cna_kernels import Circuit, InputError, SteeringTable, ops
from cna_kernels.reference import dense_scale

L, N = 3, 10
FIRST = Circuit(((2, 7, 1.0), (0, 3, 1.0), (2, 1, 1.0)), L, N)
SECOND = Circuit(((2, 7, 1.0), (2, 9, 1.0)), L, N)


def test_layers_hold_every_circuit():
    table = SteeringTable([FIRST, SECOND], [0.0, 2.0], L, N)
    assert table.layer(1) is None
    dense = dense_scale(table.layer(2), N)
    expected = torch.ones(3, N)
    expected[0, [1, 7]] = 0
    expected[1, [7, 9]] = 2
    assert torch.equal(dense, expected)
    expected = torch.ones(3, N)
    expected[0, 3] = 0
    assert torch.equal(dense_scale(table.layer(0), N), expected)


def test_multipliers_change_in_place():
    table = SteeringTable([FIRST, SECOND], [0.0, 2.0], L, N)
    scale = table.layer(2)
    address = scale.value.data_ptr()
    table.set_multipliers([0.5, -1.0])
    assert table.layer(2).value.data_ptr() == address
    assert torch.equal(dense_scale(scale, N)[:2, 7], torch.tensor([0.5, -1.0])), "views see the change"
    with pytest.raises(ValueError, match="multipliers: expected 2, got 1"):
        table.set_multipliers([1.0])
    with pytest.raises(InputError, match="multiplier: expected a finite number"):
        table.set_multipliers([1.0, float("nan")])
    assert torch.equal(dense_scale(scale, N)[:2, 7], torch.tensor([0.5, -1.0])), "a refusal changes nothing"


def test_multipliers_change_outside_the_inference_mode_they_were_made_in():
    with torch.inference_mode():
        table = SteeringTable([FIRST], [0.0], L, N)
    table.set_multipliers([2.0])
    assert table.layer(0).value.tolist() == [2.0]


def test_256_circuits_in_one_batch():
    generator = torch.Generator().manual_seed(0)
    circuits = []
    for _ in range(256):
        places = torch.randperm(L * N, generator=generator)[:4].tolist()
        circuits.append(Circuit(tuple((*divmod(place, N), 1.0) for place in places), L, N))
    multipliers = torch.rand(256, generator=generator).tolist()
    table = SteeringTable(circuits, multipliers, L, N)
    act = torch.randn(256, N, generator=generator)
    eye = torch.eye(N)
    for layer in range(L):
        got = ops.down_proj(act, eye, scale=table.layer(layer), row_circuit=table.rows(range(256)))
        for row, circuit in enumerate(circuits):
            expected = act[row].clone()
            expected[circuit.by_layer().get(layer, [])] *= multipliers[row]
            assert (got[row] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300, None, "0"])
def test_multipliers_must_be_finite_numbers(bad):
    with pytest.raises(InputError, match="multiplier: expected a finite number"):
        SteeringTable([FIRST], [bad], L, N)


def test_refusals():
    with pytest.raises(InputError, match="n_layers: made for another model: expected 4, got 3"):
        SteeringTable([FIRST], [0.0], 4, N)
    with pytest.raises(ValueError, match="multipliers: expected 2, one for each circuit, got 1"):
        SteeringTable([FIRST, SECOND], [0.0], L, N)
    with pytest.raises(ValueError, match="row_circuit: expected -1 to 0, got 1"):
        SteeringTable([FIRST], [0.0], L, N).rows([0, 1])
