"""What steers a request, and how its cache is told of it."""

import copy

import pytest

from attach_cases import make, random_circuit
from cna_kernels import attach
from cna_kernels.engine.requests import LARGEST, Request, Ways, extended, span, told_apart

SPANS = (  # phase, start, stop, tokens of the prompt; positions that are steered
    ("both", 0, LARGEST, 5, (0, LARGEST)),
    ("both", 3, 8, 5, (3, 8)),
    ("prompt", 0, LARGEST, 5, (0, 5)),
    ("prompt", 6, LARGEST, 5, (6, 6)),
    ("answer", 0, LARGEST, 5, (5, LARGEST)),
    ("answer", 7, 9, 5, (7, 9)),
    ("answer", 0, 4, 5, (5, 5)),
)


@pytest.mark.parametrize(("phase", "start", "stop", "n_prompt", "expected"), SPANS)
def test_positions_that_are_steered(phase, start, stop, n_prompt, expected):
    assert span(phase, start, stop, n_prompt) == expected


# pieces that were computed one after the other (first, behind the last, steered positions, way); the ways of 10 tokens
PIECES = {
    "all": ([(0, 10, (0, LARGEST), 1)], [1] * 10),
    "none": ([(0, 10, (0, 0), 0)], [0] * 10),
    "the middle": ([(0, 10, (3, 6), 1)], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]),
    "by pieces": ([(0, 4, (2, 8), 1), (4, 5, (2, 8), 1), (5, 10, (2, 8), 1)], [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]),
    "changed": ([(0, 4, (0, LARGEST), 1), (4, 6, (0, LARGEST), 2), (6, 10, (0, 0), 0)], [1] * 4 + [2] * 2 + [0] * 4),
    "read again": ([(0, 8, (0, LARGEST), 1), (0, 10, (0, LARGEST), 2)], [2] * 10),
    "one token again": ([(0, 8, (0, LARGEST), 1), (7, 10, (0, LARGEST), 2)], [1] * 7 + [2] * 3),
    "nothing changes": ([(0, 5, (0, LARGEST), 1), (5, 10, (0, LARGEST), 1)], [1] * 10),
}


@pytest.mark.parametrize("case", PIECES)
def test_the_cache_is_told_what_steered_each_token(case):
    pieces, expected = PIECES[case]
    runs = []
    for start, stop, steered, way in pieces:
        runs = extended(runs, start, stop, steered, way)
    tokens = list(range(20, 30))
    told = told_apart(tokens, runs, 100)
    assert [0 if new == old else (-1 - old - new) // 100 for new, old in zip(told, tokens, strict=True)] == expected
    assert len(runs) <= len(pieces) + 1


def test_ways_that_cannot_be_told_apart():
    assert told_apart([5, 6], [(0, 1)], 100) == [-106, -107]
    assert told_apart([5, 100], [(0, 1)], 100) is None  # a token beyond the vocabulary
    assert told_apart([5, 100], [(1, 0)], 100) == [5, 100]
    last = LARGEST // 100 - 1
    assert told_apart([99], [(0, last)], 100) == [-1 - 99 - 100 * last] and -1 - 99 - 100 * last >= -LARGEST
    assert told_apart([99], [(0, last + 1)], 100) is None


def test_a_way_is_a_content_and_a_multiplier():
    engine = attach(make("llama"))
    one, other = (random_circuit(engine, seed) for seed in (1, 2))
    engine.set([one, other, one], [0.0, 0.0, 0.0])
    ways = Ways(engine.table)
    first, second, third = (ways.of_circuit(number) for number in range(3))
    assert first == third != second and 0 not in (first, second)
    assert ways.of_circuit(-1) == ways.of_circuit(7) == 0
    engine.table.set_multiplier(0, 2.0)
    assert ways.of_circuit(0) not in (0, first, second)
    engine.table.set_multiplier(0, 1.0)
    assert ways.of_circuit(0) == 0
    engine.table.replace(0, other, 0.0)
    assert ways.of_circuit(0) == second
    engine.table.replace(0, one, 0.0)
    assert ways.of_circuit(0) == first


def test_copies_of_a_request_are_the_request():
    request = Request((3, "both", 0, LARGEST))
    assert copy.deepcopy({"a": request})["a"] is request and request.number.tolist() == [3]
