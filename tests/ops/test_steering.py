"""SteeringTable: many circuits, multipliers and circuits changed in place, refusals."""

import random
import threading

import numpy as np
import pytest
import torch

from cna_kernels import Circuit, InputError, SteeringTable, ops
from cna_kernels.scale import dense_scale, make_scale

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
    assert dense_scale(table.layer(0), N)[0, 3] == 2


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
        got = ops.down_proj(act, eye, scale=table.layer(layer), row_circuit=table.row_circuit(range(256)))
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
    with pytest.raises(InputError, match="row_circuit: row 1: expected -1 or one of 0, got 1"):
        SteeringTable([FIRST], [0.0], L, N).rows([0, 1])


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(2), torch.tensor(0.5), True])
def test_numbers_of_other_libraries(number):
    table = SteeringTable([FIRST], [number], L, N)
    table.replace(0, FIRST, number)
    table.set_multiplier(0, number)
    assert dense_scale(table.layer(0), N)[0, 3] == float(number)


def live(**sizes):
    return SteeringTable([], [], L, N, **{"max_circuits": 4, "max_entries": 8, **sizes})


def random_circuit(rng, n_neurons, n_layers=L, size=3):
    places = rng.sample(range(n_layers * n_neurons), size)
    return Circuit(tuple((*divmod(place, n_neurons), 1.0) for place in places), n_layers, n_neurons)


def addresses(table):
    return [part.data_ptr() for layer in range(L) for part in table.layer(layer)]


def assert_holds(table, expected, n_neurons=N):
    """The table holds exactly ``expected``: number -> (circuit, multiplier)."""
    for layer in range(L):
        dense = torch.ones(table.max_circuits + 1, n_neurons)
        for number, (circuit, multiplier) in expected.items():
            dense[number, circuit.by_layer().get(layer, [])] = multiplier
        assert torch.equal(dense_scale(table.layer(layer), n_neurons), dense)


def test_circuits_come_change_and_go_in_place():
    """200 random changes, in a table so small that gaps must be closed: the table always holds what was put in."""
    rng, table, expected = random.Random(0), live(), {}
    before, closed = addresses(table), 0
    for _ in range(200):
        used = table._used
        what = rng.choice(["add", "replace", "remove", "multiplier"])
        circuit, multiplier = random_circuit(rng, N, size=rng.randint(0, 3)), rng.choice([0.0, 0.5, -2.0])
        try:
            if what == "add":
                expected[table.add(circuit, multiplier)] = circuit, multiplier
            elif what == "replace":
                number = rng.randrange(4)
                table.replace(number, circuit, multiplier)
                expected[number] = circuit, multiplier
            elif expected and what == "remove":
                table.remove(number := rng.choice(list(expected)))
                del expected[number]
            elif expected:
                table.set_multiplier(number := rng.choice(list(expected)), multiplier)
                expected[number] = expected[number][0], multiplier
        except InputError as error:
            assert "max_" in str(error)
        closed += table._used < used
        assert_holds(table, expected)
        assert table.numbers == sorted(expected)
    assert closed > 5 and addresses(table) == before


def test_a_full_table_says_which_limit():
    table = live()
    for _ in range(4):
        table.add(Circuit(((0, 1, 1.0),), L, N), 0.0)
    with pytest.raises(InputError, match="table: holds 4 circuits already; see max_circuits"):
        table.add(FIRST, 0.0)
    table.replace(0, FIRST, 0.0)
    table.replace(1, FIRST, 0.0)
    with pytest.raises(InputError, match="room for 8 neurons, 7 are in use and the circuit has 3; see max_entries"):
        table.replace(2, FIRST, 0.0)
    one = Circuit(((0, 1, 1.0),), L, N)
    assert_holds(table, {0: (FIRST, 0.0), 1: (FIRST, 0.0), 2: (one, 0.0), 3: (one, 0.0)})
    for call in (lambda: table.remove(9), lambda: table.set_multiplier(9, 1.0), lambda: table.replace(9, FIRST, 1.0)):
        with pytest.raises(InputError, match="number: "):
            call()
    with pytest.raises(InputError, match="table: "):
        SteeringTable([FIRST], [0.0], L, N).add(SECOND, 0.0)


def test_threads_may_change_it_while_it_is_read():
    """Under the lock a reader sees every circuit whole: all of its neurons at one multiplier."""
    whole = Circuit(tuple((layer, index, 1.0) for layer in range(L) for index in range(N)), L, N)
    table = SteeringTable([], [], L, N, max_circuits=2, max_entries=4 * L * N)
    table.add(whole, 0.0)
    stop, seen = threading.Event(), set()

    def change():
        rng = random.Random(1)
        while not stop.is_set():
            table.replace(0, whole if rng.random() < 0.5 else FIRST, rng.choice([0.0, 2.0, 3.0]))
            table.add(SECOND, 1.0)
            table.set_multiplier(0, rng.choice([0.0, 2.0, 3.0]))
            table.remove(1)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            with table.lock:
                dense = torch.stack([dense_scale(table.layer(layer), N)[0] for layer in range(L)])
            values = set(dense.unique().tolist()) - {1.0}
            assert len(values) == 1 and int((dense != 1).sum()) in (FIRST.k, whole.k)
            seen |= values
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 1


def test_experts_share_a_layer():
    """Neuron i of expert e has the index e * own + i; circuit c in expert e is number c * n_experts + e."""
    own, n_experts = 1030, 3  # each expert has two blocks of neurons
    rng, n_neurons = random.Random(2), own * n_experts
    table = SteeringTable([], [], L, n_neurons, max_circuits=3, max_entries=500, n_experts=n_experts)
    circuits = [random_circuit(rng, n_neurons, size=90) for _ in range(3)]
    for circuit in circuits:
        table.add(circuit, 0.5)
    table.remove(1)
    for layer in range(L):
        scale = table.layer(layer)
        assert scale.offsets.shape == (9, 3)
        wanted = []
        for number, circuit in enumerate(circuits):
            members = [] if number == 1 else circuit.by_layer().get(layer, [])
            wanted += [{i - e * own: 0.5 for i in members if i // own == e} for e in range(n_experts)]
        expected = make_scale(wanted, own)
        assert torch.equal(dense_scale(scale, own), dense_scale(expected, own))
        lengths = scale.offsets.diff(dim=1)
        assert torch.equal(lengths[[0, 1, 2, 6, 7, 8]], expected.offsets.diff(dim=1)[[0, 1, 2, 6, 7, 8]])


def test_layers_may_differ_in_width_and_device():
    table = SteeringTable([], [], L, 12, ["cpu", "meta", "cpu"], max_circuits=2, n_experts=[1, 1, 4], widths=[5, 5, 12])
    table.add(Circuit(((0, 4, 1.0), (2, 11, 1.0)), L, 12), 0.0)
    assert [table.layer(layer).offsets.shape[0] for layer in range(L)] == [2, 2, 8]
    assert table.layer(1).index.is_meta and dense_scale(table.layer(2), 3)[3].tolist() == [1, 1, 0]
    with pytest.raises(InputError, match="circuit: layer 0 has 5 neurons, got neuron 5"):
        table.add(Circuit(((0, 5, 1.0),), L, 12), 0.0)
