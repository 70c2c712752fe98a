"""Shares of circuits: together the ranks' tables steer what one table steers, under the same numbers."""

import itertools

import pytest
import torch

from cna_kernels import Circuit, InputError, SteeringTable
from cna_kernels.model.parallel.sharded_table import ShardedTable
from cna_kernels.scale import dense_scale

N_LAYERS, N_NEURONS = 3, 48
CIRCUITS = [
    Circuit(((0, 3, 1.0), (0, 40, -1.0), (2, 23, 2.0), (2, 24, 1.0)), N_LAYERS, N_NEURONS),
    Circuit(((1, 0, 1.0),), N_LAYERS, N_NEURONS),  # on the first rank alone
    Circuit(((1, 47, 1.0), (0, 0, 1.0), (1, 24, 1.0)), N_LAYERS, N_NEURONS, mirrored=((1, 47), (0, 0))),
    Circuit(((2, 47, 1.0),), N_LAYERS, N_NEURONS, mirrored=()),  # on the last rank alone
]
FIVE = Circuit(tuple((2, 43 + n, 1.0) for n in range(5)), N_LAYERS, N_NEURONS)
MULTIPLIERS = [0.0, 2.0, 0.5, -1.0]


def whole(circuits=CIRCUITS, multipliers=MULTIPLIERS):
    return SteeringTable(circuits, multipliers, N_LAYERS, N_NEURONS)


def shares(n_ranks, circuits=CIRCUITS, multipliers=MULTIPLIERS):
    return [
        ShardedTable(circuits, multipliers, N_LAYERS, N_NEURONS, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)
    ]


def factors(tables):
    """What every neuron of every layer is multiplied by, for each circuit, ``[L, K, N]``; ranks side by side."""
    width = N_NEURONS // len(tables)
    every = [[dense_scale(table.layer(layer), width) for table in tables] for layer in range(N_LAYERS)]
    return torch.stack([torch.cat(parts, dim=1) for parts in every])


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
def test_together_they_are_the_whole_table(n_ranks):
    one, parts = whole(), shares(n_ranks)
    expected = factors([one])
    assert expected[0, 0, 3] == 0 and expected[1, 2, 47] == 1.5 and expected[2, 3, 47] == -1
    assert torch.equal(factors(parts), expected)
    assert all(part.numbers == one.numbers for part in parts), "also where a rank has none of a circuit's neurons"
    changes = (
        lambda table: table.set_multipliers([3.0, 1.0, 0.0, 0.25]),
        lambda table: table.replace(3, CIRCUITS[1], [0.1]),
        lambda table: table.remove(2),
        lambda table: table.replace(1, CIRCUITS[0], [0.1, 0.2, 0.3, 0.4]),
    )
    for change in changes:
        before = factors([one])
        for table in (one, *parts):
            change(table)
        assert not torch.equal(factors([one]), before)
        assert torch.equal(factors(parts), factors([one]))
    assert [part.numbers for part in parts] == [[0, 1, 3]] * n_ranks
    for table in (one, *parts):  # 9 neurons have room, wherever they are
        with pytest.raises(InputError, match="table: has room for 9 neurons, 5 are in use and the circuit has 5"):
            table.replace(0, FIVE, 0.0)


def test_every_rank_refuses_what_a_table_refuses():
    bad = [
        (Circuit(((0, 3, 1.0),), N_LAYERS, 24), 0.0),
        (CIRCUITS[0], float("nan")),
        (CIRCUITS[0], [1.0]),
        (CIRCUITS[1], [1.0, 2.0]),
    ]
    for (circuit, multiplier), table in itertools.product(bad, shares(2)):
        before = factors([table, table])
        with pytest.raises(InputError):
            table.replace(0, circuit, multiplier)
        assert torch.equal(factors([table, table]), before)
