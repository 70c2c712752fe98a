"""What ``Engine.rows`` takes, and what it refuses: each a line."""

import os
import signal
import threading
from array import array

import numpy as np
import pytest
import torch

from attach_cases import ids_of, logits, make, random_circuit
from cna_kernels import InputError, attach

BY_MASK = "row_circuit: expected whole numbers, got bool; a mask of rows says no circuit"
# arguments of rows -> what is said
REFUSED = [
    (dict(row_circuit=0, start=-1), "start: expected positions from 0 on, got -1"),
    (dict(row_circuit=0, stop=-1), "stop: expected positions from 0 on, got -1"),
    (dict(row_circuit=[0, 0], start=[5, -2]), "start: expected positions from 0 on, got -2"),
    (dict(row_circuit=[0, 0], stop=torch.tensor([-2, 3])), "stop: expected positions from 0 on, got -2"),
    (dict(row_circuit=0, start=np.int64(-3)), "start: expected positions from 0 on, got -3"),
    (dict(row_circuit=0, start=-(2**40)), "start: expected positions from 0 on"),
    (dict(row_circuit=0, start=True), "start: expected whole numbers, got bool"),
    (dict(row_circuit=[0, 0], stop=[True, False]), "stop: expected whole numbers, got bool"),
    (dict(row_circuit=0, start=1.0), "start: expected whole numbers, got float32"),
    (dict(row_circuit=0, start=None), "start: expected whole numbers, got None"),
    (dict(row_circuit=0, start="3"), "start: expected whole numbers, got '3'"),
    (dict(row_circuit=0, start=[1, 2]), "start: expected one position, or one for each of the rows given"),
    (dict(row_circuit=[0, 0], start=[1, 2, 3]), "start: expected one position, or one for each of 2 rows, got 3"),
    (dict(row_circuit=torch.tensor([True, False])), BY_MASK),
    (dict(row_circuit=[True, False]), BY_MASK),
    (dict(row_circuit=True), BY_MASK),
    (dict(row_circuit=np.array([True, False])), BY_MASK),
    (dict(row_circuit=torch.ones(2, 3, dtype=torch.bool)), BY_MASK),
    (dict(row_circuit=torch.tensor([0.0, 1.0])), "row_circuit: expected whole numbers, got float32"),
    (dict(row_circuit=torch.tensor([0j])), "row_circuit: expected whole numbers, got complex64"),
    (dict(row_circuit="0"), "row_circuit: expected whole numbers, got '0'"),
    (dict(row_circuit=[0, None]), "row_circuit: expected whole numbers, got [0, None]"),
    (dict(row_circuit=[]), "row_circuit: expected whole numbers, got none"),
    (dict(row_circuit=-2), "row_circuit: row 0: expected -1 or one of 0, 1, got -2"),
    (dict(row_circuit=[0, 2]), "row_circuit: row 1: expected -1 or one of 0, 1, got 2"),
    (dict(row_circuit=2**32), "row_circuit: row 0: expected -1 or one of 0, 1, got 4294967296"),
    (dict(row_circuit=torch.zeros(1, 1, 1, dtype=torch.int64)), "row_circuit: expected whole numbers [B] or [B, S]"),
]
TAKEN = [
    dict(row_circuit=[0, -1]), dict(row_circuit=(0, 1)), dict(row_circuit=np.array([0, 1], dtype=np.int16)),
    dict(row_circuit=torch.tensor([1, 0], dtype=torch.uint8)), dict(row_circuit=None), dict(row_circuit=1),
    dict(row_circuit=[0, 0], start=[0, 2**40]), dict(row_circuit=0, start=np.int64(3), stop=5),
    dict(row_circuit=[0, 1], stop=torch.tensor([0, 3])),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    engine = attach(make("llama"))
    engine.set([random_circuit(engine, 0), random_circuit(engine, 1)], [-2.0, 3.0])
    return engine


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_refused(engine, given, said):
    engine.rows([1, 1])
    with pytest.raises(InputError) as refused:
        engine.rows(**given)
    assert str(refused.value).startswith(said)
    assert engine._rows.given.tolist() == [1, 1], "a refusal changes nothing"


@pytest.mark.parametrize("given", TAKEN, ids=str)
def test_taken(engine, given):
    engine.rows(**given)
    engine.rows(None)
    assert engine._rows.given is None and (engine._rows.circuit == -1).all()


def test_windows_of_several_kinds_agree():
    """The same window, given as numbers, lists, arrays and tensors."""
    model, ids = make("llama"), ids_of(2, 6)
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    found = []
    for start, stop in ((2, 4), ([2, 2], [4, 4]), (np.array([2, 2]), torch.tensor([4, 4], dtype=torch.int32))):
        engine.rows([0, 0], start=start, stop=stop)
        found.append(logits(model, ids))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    engine.rows([0, 0])
    assert not torch.equal(found[0], logits(model, ids))


def test_a_number_that_rows_name_is_not_given_again():
    """Rows that name a removed circuit are unsteered, whatever is added then."""
    model, ids = make("llama"), ids_of(2, 6)
    engine = attach(model, max_circuits=2)
    circuits = [random_circuit(engine, seed) for seed in range(3)]
    engine.set(circuits[:2], [-2.0, 3.0])
    for rows in ([0, 1], [[0] * 6, [1] * 6]):
        engine.rows(rows)
        engine.rows([-1, 1])
        expected = logits(model, ids)
        engine.rows(rows)
        engine.table.remove(0)
        with pytest.raises(InputError, match=r"table: rows still name what is free \(0\)"):
            engine.table.add(circuits[2], 5.0)
        assert torch.allclose(logits(model, ids), expected, atol=1e-5)
        engine.table.replace(0, circuits[0], -2.0)  # asked for by its number
        assert not torch.allclose(logits(model, ids), expected, atol=1e-5)


def test_numbers_that_no_row_names_any_more_are_free():
    """Rows and shapes that a later call of rows leaves out name nothing."""
    engine = attach(make("llama"), max_circuits=2)
    circuits = [random_circuit(engine, seed) for seed in range(2)]
    for before, after in (([0, 1], [-1]), (torch.tensor([[0, 1]]), None), (torch.tensor([[0, 1]]), [[-1]])):
        engine.set(circuits, [-2.0, 3.0])
        engine.rows(before)
        engine.rows(after)
        for number in (0, 1):
            engine.table.remove(number)
        assert [engine.table.add(circuit, 1.0) for circuit in circuits] == [0, 1]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array, lambda values: array("i", values)])
def test_bounds_are_copied(kind):
    """``steer`` puts back the rows as they were given, whatever became of the caller's list since."""
    model, ids = make("llama"), ids_of(2, 6)
    engine, start = attach(model), kind([2, 2])
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [-2.0])
    engine.rows([0, 0], start=start)
    expected = logits(model, ids)
    start[0] = 5
    with engine.steer(circuit, 0.0):
        pass
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_runs_passes_while_the_parent_does():
    """Passes hold the table's lock: a child that is forked meanwhile has none of the threads that would release it."""
    model, ids = make("llama"), ids_of(2, 6)
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows(0)
    expected, entered, over = logits(model, ids), threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is thread:
            entered.set()
            over.wait()

    thread = threading.Thread(target=logits, args=(model, ids))
    waiting = model.model.layers[1].register_forward_pre_hook(wait)
    thread.start()
    entered.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        engine.table.set_multiplier(0, -2.0)
        os._exit(0 if torch.allclose(logits(model, ids), expected, atol=1e-5) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    over.set()
    thread.join()
    waiting.remove()
    assert code == 0


# Sequences that are packed in one row: what shows where each begins, for lengths 5, 3 and 4.
LENGTHS = (5, 3, 4)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
EDGES = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
PACKED = {
    "positions": dict(position_ids=POSITIONS),
    "edges": dict(position_ids=POSITIONS, cu_seq_lens_q=EDGES),
}


@pytest.mark.parametrize("shown", PACKED)
@pytest.mark.parametrize("windows", [{}, dict(start=[1, 0, 2], stop=[4, 2, 9])], ids=["all", "windows"])
def test_sequences_packed_in_one_row(shown, windows):
    """Each sequence has the row of its own, as in calls of one sequence."""
    model, ids, rows = make("llama"), ids_of(1, sum(LENGTHS)), [0, -1, 1]
    engine = attach(model)
    engine.set([random_circuit(engine, seed) for seed in (0, 1)], [-2.0, 0.0])
    expected, unsteered = [], []
    for number, part in enumerate(ids[0].split(LENGTHS)):
        for name, given in (("rows", rows[number]), ("none", -1)):
            engine.rows([given], **{bound: values[number] for bound, values in windows.items()})
            (expected if name == "rows" else unsteered).append(logits(model, part[None])[0])
    engine.rows(rows, **windows)
    got = logits(model, ids, use_cache=False, **PACKED[shown])[0].split(LENGTHS)
    for number, (one, wanted, plain) in enumerate(zip(got, expected, unsteered, strict=True)):
        torch.testing.assert_close(one, wanted, atol=1e-4, rtol=0)
        assert ((one - plain).abs().max() > 1e-2) == (rows[number] != -1)


PACKED_REFUSED = (
    (2, PACKED["positions"], "rows: expected 3, one for each sequence of a packed row, got 2"),
    (2, PACKED["edges"], "rows: expected 3, one for each sequence of a packed row, got 2"),
    (3, {}, "rows: expected 1, one for each row of the batch, got 3"),
    (3, dict(position_ids=torch.tensor([[1, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2]])), "rows: expected 1, one for each row"),
    (3, dict(position_ids=torch.arange(12)[None] * 2), "rows: expected 1, one for each row of the batch, got 3"),
)


@pytest.mark.parametrize(("n_rows", "call", "said"), PACKED_REFUSED)
def test_rows_that_a_packed_row_does_not_show(n_rows, call, said):
    model = make("llama")
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows([0] * n_rows)
    with pytest.raises(InputError, match=said):
        logits(model, ids_of(1, 12), **call)
    engine.rows([0, -1, -1], phase="prompt")
    with pytest.raises(InputError, match="phase: a call without a cache does not say where its prompt ends"):
        logits(model, ids_of(1, 12), use_cache=False, **PACKED["positions"])
