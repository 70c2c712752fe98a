"""SteeringTable: many circuits, multipliers and circuits changed in place, refusals."""

import copy
import os
import pickle
import random
import signal
import threading

import numpy as np
import pytest
import torch

from cna_kernels import ActivationSums, Circuit, InputError, SteeringTable, ops
from cna_kernels.scale import dense_scale, make_scale

L, N = 3, 10
FIRST = Circuit(((2, 7, 1.0), (0, 3, 1.0), (2, 1, 1.0)), L, N)
SECOND = Circuit(((2, 7, 1.0), (2, 9, 1.0)), L, N)


def test_layers_hold_every_circuit():
    table = SteeringTable([FIRST, SECOND], [0.0, 2.0], L, N)
    assert torch.equal(dense_scale(table.layer(1), N), torch.ones(3, N)), "a layer where no circuit has a neuron"
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


# Tables made without max_circuits: name -> (what is done to a table of FIRST at 0, what it then holds or refuses).
MIDDLE = Circuit(((1, 4, 1.0), (1, 8, 1.0)), L, N)
CHANGES = {
    "other layers": (lambda table: table.replace(0, MIDDLE, 0.0), {0: (MIDDLE, 0.0)}),
    "removed, and another added": (lambda table: (table.remove(0), table.add(MIDDLE, 2.0)), {0: (MIDDLE, 2.0)}),
    "removed": (lambda table: table.remove(0), {}),
    "replaced twice": (lambda table: (table.replace(0, MIDDLE, 0.0), table.replace(0, FIRST, 3.0)), {0: (FIRST, 3.0)}),
    "replaced, then another multiplier": (
        lambda table: (table.replace(0, MIDDLE, 0.0), table.set_multipliers([0.25])), {0: (MIDDLE, 0.25)},
    ),
    "one more": (lambda table: table.add(MIDDLE, 0.0), "table: holds 1 circuits already; see max_circuits"),
    "a larger circuit": (
        lambda table: table.replace(0, Circuit(tuple((1, n, 1.0) for n in range(4)), L, N), 0.0),
        "table: has room for 3 neurons, 0 are in use and the circuit has 4; see max_entries",
    ),
    "a number beyond": (lambda table: table.replace(1, MIDDLE, 0.0), "number: expected 0 to 0, got 1"),
    "a negative number": (lambda table: table.replace(-1, MIDDLE, 0.0), "number: expected 0 to 0, got -1"),
    "a bool for a number": (lambda table: table.replace(False, MIDDLE, 0.0), "number: expected a whole number"),
    "a fraction for a number": (lambda table: table.replace(0.0, MIDDLE, 0.0), "number: expected a whole number"),
    "a bool removed": (lambda table: table.remove(False), "number: expected a whole number, got False"),
    "a bool's multiplier": (lambda table: table.set_multiplier(np.False_, 1.0), "number: expected a whole number"),
    "a tensor's multiplier": (lambda table: table.set_multiplier(torch.tensor(0), 4.0), {0: (FIRST, 4.0)}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_table_of_given_circuits_changes_too(change):
    """Also for a program that asked for the layers before, as a captured graph has."""
    do, expected = CHANGES[change]
    table = SteeringTable([FIRST], [0.0], L, N)
    before = [table.layer(layer) for layer in range(L)]
    if isinstance(expected, str):
        with pytest.raises(InputError) as refused:
            do(table)
        assert str(refused.value).startswith(expected)
        expected = {0: (FIRST, 0.0)}
    else:
        do(table)
    assert_holds(table, expected)
    for layer in range(L):
        assert torch.equal(dense_scale(before[layer], N), dense_scale(table.layer(layer), N))


def test_the_ops_of_every_layer_take_the_table():
    """A layer where no circuit has a neuron is computed like any other, and comes out unsteered."""
    table, sums = SteeringTable([FIRST, FIRST], [0.0, 2.0], L, N), ActivationSums(L, N, 2)
    rows, token_weight, act = table.row_circuit([0, -1]), torch.ones(2, 2), torch.randn(2, N)
    for layer in range(L):
        extras = dict(token_weight=token_weight, **sums.layer(layer), scale=table.layer(layer), row_circuit=rows)
        for backend in ("reference", None):
            steered = ops.steer_act(act, **extras, backend=backend)
            expected = act.clone()
            expected[0, FIRST.by_layer().get(layer, [])] = 0
            assert torch.equal(steered, expected)


BOOL = "row_circuit: expected a whole number"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([True, False], BOOL), (np.array([True]), BOOL), (torch.tensor([False, True]), BOOL), ([0.0], BOOL),
        ([0.5], BOOL), ([None], BOOL), (["0"], BOOL), (torch.tensor([0.0]), BOOL),
        ([-2], "row_circuit: row 0: expected -1"),
        ([0, 1], "row_circuit: row 1: expected -1 or one of 0, got 1"), ([-1, 0], None), ((0,), None),
        (np.array([0, -1]), None), (torch.tensor([-1, 0], dtype=torch.int8), None), (range(1), None), ([], None),
    ],
    ids=repr,
)  # fmt: skip
def test_rows_are_whole_numbers(rows, said):
    table = SteeringTable([FIRST], [0.0], L, N)
    if said is None:
        got = table.row_circuit(rows)
        assert got.dtype == torch.int32 and got.tolist() == [int(number) for number in rows]
    else:
        with pytest.raises(InputError, match=said):
            table.row_circuit(rows)


# Aligned circuits.

# neurons in rank order, which is not the order of layers; the second and the fourth are mirrored
NEURONS = ((2, 7, 1.0), (0, 3, -1.0), (2, 1, -1.0), (2, 0, 1.0), (1, 5, 2.0))
ALIGNED = Circuit(NEURONS, L, N, positive_mean=(1.0, 2.0, -0.5, -3.0, 0.0)).aligned()


def dense_of(*held):
    """The table's definition: ``[L, K + 1, N]`` from (circuit, multiplier) pairs."""
    dense = torch.ones(L, len(held) + 1, N)
    for number, (circuit, multiplier) in enumerate(held):
        for (layer, index), factor in zip(circuit.pairs, circuit.multipliers(multiplier), strict=True):
            dense[layer, number, index] = factor
    return dense


@pytest.mark.parametrize("m", [0.0, 0.25, 1.0, 1.5, 2.0, -7.0])
def test_aligned_circuits_hold_what_each_neuron_gets(m):
    """Beside a plain circuit, added, replaced, moved, copied, held again and changed in place."""
    assert ALIGNED.mirrored == ((0, 3), (2, 0))
    table = SteeringTable([FIRST, ALIGNED], [0.5, 0.25], L, N, max_circuits=3, max_entries=12)
    scales, before = [table.layer(layer) for layer in range(L)], addresses(table)

    def holds(expected, of=None):
        of = scales if of is None else [of.layer(layer) for layer in range(L)]
        return all(torch.equal(dense_scale(of[i], N)[: len(expected[i]) - 1], expected[i][:-1]) for i in range(L))

    table.set_multiplier(1, m)
    expected = dense_of((FIRST, 0.5), (ALIGNED, m))
    assert holds(expected) and addresses(table) == before, "a change is a write in place, which views see"
    copied, held = copy.deepcopy(table), table.held()
    assert holds(expected, copied) and holds(expected, pickle.loads(pickle.dumps(table)))
    copied.set_multiplier(1, 3.0)
    assert holds(dense_of((FIRST, 0.5), (ALIGNED, 3.0)), copied) and holds(expected)
    table.remove(0)
    table.replace(2, MIDDLE, m)
    table.replace(0, Circuit(tuple((1, n, 1.0) for n in range(5)), L, N), 0.0)  # there is room once gaps are closed
    assert holds(dense_of((Circuit(tuple((1, n, 1.0) for n in range(5)), L, N), 0.0), (ALIGNED, m), (MIDDLE, m)))
    table.hold(held)
    assert holds(expected)
    table.set_multipliers([2.0, 1.5])
    assert holds(dense_of((FIRST, 2.0), (ALIGNED, 1.5)))
    table.replace(1, Circuit(NEURONS, L, N), m)
    assert holds(dense_of((FIRST, 2.0), (Circuit(NEURONS, L, N), m))), "the plain circuit of the same neurons"


def test_neurons_may_have_multipliers_of_their_own():
    """In rank order, moved and copied like others, until one number is set for all."""
    own = [0.0, 2.0, -1.5, 0.5, 1.0]
    plain = Circuit(NEURONS, L, N)
    table = SteeringTable([FIRST], [0.5], L, N, max_circuits=3, max_entries=12)
    assert table.add(plain, own) == 1
    table.remove(0)
    table.replace(0, Circuit(tuple((1, n, 1.0) for n in range(5)), L, N), 0.0)  # there is room once gaps are closed
    expected = torch.ones(L, N)
    for (layer, index), factor in zip(plain.pairs, own, strict=True):
        expected[layer, index] = factor
    for of in (table, copy.deepcopy(table)):
        assert all(torch.equal(dense_scale(of.layer(layer), N)[1], expected[layer]) for layer in range(L))
    with pytest.raises(InputError, match="multiplier: expected one number, or 5"):
        table.replace(1, plain, own[:4])
    with pytest.raises(InputError, match="multiplier: expected a finite number"):
        table.replace(1, plain, [*own[:4], float("inf")])
    table.set_multiplier(1, 1.0)
    assert all(torch.equal(dense_scale(table.layer(layer), N)[1], torch.ones(N)) for layer in range(L))


@pytest.mark.parametrize("m", [0.0, 0.5, 2.0])
def test_the_ops_steer_by_aligned_circuits(m):
    table, act = SteeringTable([ALIGNED, FIRST], [1.0, m], L, N), torch.randn(3, N)
    table.set_multiplier(0, m)
    rows, dense = table.row_circuit([0, 1, -1]), dense_of((ALIGNED, m), (FIRST, m))
    for layer in range(L):
        for backend in ("reference", None):
            steered = ops.steer_act(act, scale=table.layer(layer), row_circuit=rows, backend=backend)
            assert torch.equal(steered, act * dense[layer])
        assert (steered[0] != act[0]).any() == (layer != 1 or m != 1), "steering without effect would hide everything"


# Numbers that come free.


def one(index):
    return Circuit(((0, index, 1.0),), L, N)


def test_a_number_is_not_given_again_while_rows_name_it():
    table = SteeringTable([one(0), one(1)], [0.0, 0.0], L, N, max_circuits=3)
    rows = table.row_circuit([0, 1, -1])
    table.remove(0)
    assert table.add(one(2), 0.0) == 2, "a number that no circuit has had comes first"
    act = torch.ones(3, N)
    steered = ops.steer_act(act, scale=table.layer(0), row_circuit=rows)
    assert torch.equal(steered[0], act[0]), "a row that names what was removed is unsteered"
    with pytest.raises(InputError, match=r"table: rows still name what is free \(0\): give them other numbers"):
        table.add(one(3), 0.0)
    assert_holds(table, {1: (one(1), 0.0), 2: (one(2), 0.0)})
    rows[0] = -1
    assert table.add(one(3), 0.0) == 0
    table.remove(1)
    del rows
    assert table.add(one(4), 0.0) == 1, "the rows that named it are gone"


def test_numbers_come_back_in_the_order_in_which_they_came_free():
    table = SteeringTable([one(n) for n in range(4)], [0.0] * 4, L, N)
    for number in (2, 0, 3):
        table.remove(number)
    table.replace(0, one(5), 0.0)  # asked for by its number: not free any more
    assert [table.add(one(6), 0.0), table.add(one(7), 0.0)] == [2, 3]
    with pytest.raises(InputError, match="table: holds 4 circuits already"):
        table.add(one(8), 0.0)


def test_rows_of_a_program_are_known_when_it_says_so():
    table = SteeringTable([one(0)], [0.0], L, N)
    rows = torch.zeros(2, dtype=torch.int32)
    table.keep_numbers_of(rows)
    table.remove(0)
    with pytest.raises(InputError, match="rows still name what is free"):
        table.add(one(1), 0.0)
    table.replace(0, one(1), 0.0)  # the program may say so
    assert table.numbers == [0]


# Copies.


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))],
    ids=["copy", "deepcopy", "pickle"],
)  # fmt: skip
@pytest.mark.parametrize("sizes", [dict(), dict(n_experts=2), dict(widths=[10, 8, 10])], ids=str)
def test_copies_are_equal_and_independent(duplicate, sizes):
    circuits = [Circuit(tuple((l, n, 1.0) for l, n in ((0, 3), (1, 7), (2, 1), (2, 6))), L, N), MIDDLE, SECOND]  # noqa: E741
    circuits = circuits[: 1 if "widths" in sizes else 3]
    table = SteeringTable([], [], L, N, max_circuits=4, max_entries=9, **sizes)
    for circuit in circuits:
        table.add(circuit, 0.5)
    if len(circuits) > 1:
        table.remove(1)
        table.set_multiplier(2, -1.0)
    other, widths = duplicate(table), sizes.get("widths", [N] * L)

    def dense(of):
        own = [width // sizes.get("n_experts", 1) for width in widths]
        return [dense_scale(of.layer(layer), own[layer]) for layer in range(L)]

    before = dense(table)
    assert all(map(torch.equal, dense(other), before)) and other.numbers == table.numbers
    assert (other.max_circuits, other.max_entries) == (4, 9) and other.lock is not table.lock
    added = [each.add(one(1), 3.0) for each in (table, other)]
    assert added[0] == added[1] and all(map(torch.equal, dense(other), dense(table)))
    other.set_multiplier(0, 7.0)
    other.remove(added[1])
    assert all(map(torch.equal, dense(table)[1:], before[1:])), "a copy has buffers of its own"
    assert not all(map(torch.equal, dense(other), dense(table)))
    assert pickle.loads(pickle.dumps(other)).add(one(2), 0.0) == other.add(one(2), 0.0)


# Forks.


def in_child(run):
    """Fork, and return the child's exit code: 0 if ``run()`` is true there, 14 (SIGALRM) if it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if run() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_does_not_wait_for_a_lock_of_its_parents_threads():
    table = SteeringTable([FIRST], [0.0], L, N)
    copied = copy.deepcopy(table)
    held, over = threading.Event(), threading.Event()

    def hold():
        with table.lock, copied.lock:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def change():
        for each in (table, copied):
            each.set_multiplier(0, 2.0)
            each.replace(0, MIDDLE, 3.0)
        return dense_scale(copied.layer(1), N)[0, 4] == 3

    try:
        assert in_child(change) == 0
    finally:
        over.set()
        thread.join()
    with table.lock:  # the thread that forks may hold the lock itself
        assert in_child(lambda: table.set_multiplier(0, 2.0) is None) == 0
    assert_holds(table, {0: (FIRST, 0.0)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_child_sees_a_change_whole(step, monkeypatch):
    """Forked at any step of a change that moves entries: the child's table holds the old or the new circuits."""
    table = SteeringTable([], [], L, N, max_circuits=3, max_entries=7)
    for circuit in (one(0), FIRST, SECOND):
        table.add(circuit, 0.0)
    table.remove(0)
    old = {1: (FIRST, 0.0), 2: (SECOND, 0.0)}
    new = old | {0: (MIDDLE, 2.0)}
    codes, steps = [], [0]

    def holds(expected):
        try:
            assert_holds(table, expected)
        except AssertionError:
            return False
        return True

    def at_step(number, entries, put=table._put):
        steps[0] += 1  # before the fork: the child ends the change, and takes the steps that are left itself
        if steps[0] == step + 1:
            codes.append(in_child(lambda: holds(old) or holds(new)))
        put(number, entries)

    monkeypatch.setattr(table, "_put", at_step)
    table.replace(0, MIDDLE, 2.0)
    assert_holds(table, new)
    assert codes == [0] and steps[0] == 3, "all entries move"
