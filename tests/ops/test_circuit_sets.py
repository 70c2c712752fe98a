"""Parts, unions, intersections and differences of circuits: their neurons, their order, and what they still claim."""

import dataclasses
import hashlib
import json
import sys

import pytest

from cna_kernels import Circuit, InputError
from cna_kernels.circuit_sets import prompts_of

PROMPTS = {"positive": {"count": 2, "sha256": "p"}, "negative": {"count": 3, "sha256": "n"}}
OTHERS = {"positive": {"count": 5, "sha256": "q"}, "negative": {"count": 6, "sha256": "m"}}
UNIVERSAL = {"prompts": 24, "prompts_sha256": "x", "fraction": 0.001, "threshold": 0.8, "excluded": [[0, 1]]}
# ranked by another score than the size of the contrast
NEURONS = ((2, 7, -1.5), (0, 3, 4.0), (2, 1, 0.5), (1, 6, -0.25), (1, 2, 3.0))
MEANS = (-2.0, -1.0, 0.125, 0.75, 8.0)
BOOTSTRAP = {
    "replicates": 4, "seed": 0, "overlap": 0.5, "pairwise_overlap": 0.5, "frequency": [1.0, 0.75, 0.5, 0.25, 0.0],
    "others": [],
}  # fmt: skip
WHOLE = Circuit(
    NEURONS, 3, 10, score="magnitude", fraction=0.2, k_rule="rule", position="last", skipped_layers=(), dtype="float32",
    universal=UNIVERSAL, model={"name": "m", "tensors_sha256": "t", "decoder_sha256": "d"}, tokenizer_sha256="k",
    chat_template_sha256="c", chat={"args": {}, "system": "be brief", "day": "1"}, prompts=PROMPTS, preset="paper",
    versions={"torch": "2"}, bootstrap=BOOTSTRAP, folds={"n": 2, "overlap": [1.0, 0.5], "retained": [0.5, 0.5]},
    excluded=((0, 0), (1, 1)), positive_mean=MEANS,
)  # fmt: skip
# another question to the same model: (0, 3) and (1, 6) are in both
NEXT = dataclasses.replace(
    WHOLE, neurons=((0, 3, -9.0), (0, 8, 3.5), (1, 6, 2.0), (2, 2, 0.125)), positive_mean=(9.0, 8.0, 7.0, 6.0),
    prompts=OTHERS, bootstrap=None, folds=None,
)  # fmt: skip
OF_THE_WHOLE = ("fraction", "bootstrap", "folds")
OF_NEURONS = ("neurons", "positive_mean", "mirrored", "k_rule", "made_from", *OF_THE_WHOLE)


def is_written(circuit, path):
    circuit.save(path / "c.json")
    return Circuit.load(path / "c.json") == circuit


def claims(circuit):
    """What a circuit says besides its neurons."""
    fields = (field.name for field in dataclasses.fields(circuit))
    return {name: getattr(circuit, name) for name in fields if name not in OF_NEURONS}


def test_a_circuit_is_a_sequence_of_its_neurons():
    assert len(WHOLE) == 5 and list(WHOLE) == list(NEURONS) and WHOLE[0] == NEURONS[0] and WHOLE[-1] == NEURONS[4]
    assert (0, 3) in WHOLE and (0, 3, 4.0) in WHOLE and (0, 4) not in WHOLE and (0, 3, 4.5) not in WHOLE
    assert 3 not in WHOLE and None not in WHOLE
    with pytest.raises(IndexError):
        WHOLE[5]
    with pytest.raises(TypeError):
        WHOLE["0"]
    assert not Circuit((), 3, 10) and WHOLE, "an empty one is false, as an empty list"


@pytest.mark.parametrize("aligned", [False, True], ids=["plain", "aligned"])
@pytest.mark.parametrize(
    ("take", "ranks", "rule"),
    [
        (lambda c: c[:2], [0, 1], "top 2"), (lambda c: c.top(3), [0, 1, 2], "top 3"), (lambda c: c.top(0), [], "top 0"),
        (lambda c: c[1:3], [1, 2], "ranks 2 to 3"), (lambda c: c[-2:], [3, 4], "ranks 4 to 5"),
        (lambda c: c[::2], [0, 2, 4], "ranks 1 to 5 in steps of 2"), (lambda c: c[9:], [], "top 0"),
        (lambda c: c.positive(), [1, 2, 4], "positive contrast"), (lambda c: c.negative(), [0, 3], "negative contrast"),
        (lambda c: c & NEXT, [1, 3], "in another circuit, too,"),
        (lambda c: c - NEXT, [0, 2, 4], "not in another circuit,"),
    ],
)  # fmt: skip
def test_a_part_keeps_what_is_true_of_it(tmp_path, take, ranks, rule, aligned):
    whole = WHOLE.aligned() if aligned else WHOLE
    some = take(whole)
    assert some.neurons == tuple(NEURONS[rank] for rank in ranks)
    assert some.positive_mean == tuple(MEANS[rank] for rank in ranks) and some.k_rule == f"{rule} of rule"
    assert claims(some) == claims(WHOLE) and {getattr(some, name) for name in OF_THE_WHOLE} == {None}
    assert is_written(some, tmp_path)
    of = dict(zip(whole.pairs, whole.multipliers(3.0), strict=True))
    assert some.multipliers(3.0) == [of[pair] for pair in some.pairs] and (some.mirrored is None) != aligned
    assert (some.made_from is not None) == ("another" in rule)


def test_all_of_a_circuit_is_the_circuit():
    for same in (WHOLE[:], WHOLE.top(5), WHOLE[:9], WHOLE & WHOLE, WHOLE | WHOLE, WHOLE | WHOLE[:2], WHOLE - NEXT[1:2]):
        assert same is WHOLE
    assert (WHOLE - WHOLE).k == 0 and (WHOLE - WHOLE).made_from["operation"] == "difference"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: WHOLE.top(6), "n: expected 0 to 5, the neurons of the circuit, got 6"),
        (lambda: WHOLE.top(-1), "n: expected 0 to 5"), (lambda: WHOLE.top(1.5), "n: expected a whole number"),
        (lambda: WHOLE[::-1], "circuit: a slice keeps the rank order"),
    ],
)  # fmt: skip
def test_parts_that_there_are_not(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_a_union_has_the_largest_contrasts_first(tmp_path):
    both = WHOLE | NEXT
    assert both.neurons == (
        (0, 3, 4.0), (0, 8, 3.5), (1, 2, 3.0), (2, 7, -1.5), (2, 1, 0.5), (1, 6, -0.25), (2, 2, 0.125)
    )  # fmt: skip
    assert both.positive_mean == (-1.0, 8.0, 8.0, -2.0, 0.125, 0.75, 6.0), "a neuron of both is as in the left one"
    assert set((NEXT | WHOLE).pairs) == set(both.pairs) and (NEXT | WHOLE).neurons[0] == (0, 3, -9.0)
    assert is_written(both, tmp_path) and both.top(2).pairs == [(0, 3), (0, 8)]
    equal = Circuit(((1, 5, -2.0), (1, 4, 2.0)), 3, 10) | Circuit(((0, 9, 2.0), (1, 6, 2.0)), 3, 10)
    assert equal.pairs == [(0, 9), (1, 4), (1, 5), (1, 6)], "equal ones go by layer and index"


def test_a_union_claims_what_both_do():
    both = WHOLE | NEXT
    assert claims(both) == claims(WHOLE) | {"prompts": None} and {getattr(both, name) for name in OF_THE_WHOLE} == {
        None
    }
    assert both.k_rule == "union of 2 circuits" and both.mirrored is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"score": "cohen-d"}, {"score": None}),
        ({"position": "all"}, {"position": None}),
        ({"dtype": None}, {"dtype": None}),
        ({"preset": "ref-code"}, {"preset": None}),
        ({"versions": {"torch": "3"}}, {"versions": None}),
        ({"universal": None}, {"universal": None}),
        ({"skipped_layers": (0, 1)}, {"skipped_layers": ()}),
        ({"excluded": ((2, 2), (1, 1))}, {"excluded": ((1, 1),)}),
        ({"positive_mean": None}, {"positive_mean": None}),
        # model and tokenizer: what either says
        ({"model": None}, {}),
        ({"model": {"name": "n", "decoder_sha256": "d"}}, {}),
        (
            {"model": {"name": "n", "settings_sha256": "s"}},
            {"model": {"name": "m", "tensors_sha256": "t", "decoder_sha256": "d", "settings_sha256": "s"}},
        ),
        ({"tokenizer_sha256": None, "chat_template_sha256": None, "chat": None}, {}),
        # plain text and a chat, or two kinds of chat: no template without a tokenizer claims nothing
        (
            {"chat_template_sha256": None, "chat": None},
            {"chat_template_sha256": None, "tokenizer_sha256": None, "chat": None},
        ),
        ({"chat_template_sha256": "e"}, {"chat_template_sha256": None, "tokenizer_sha256": None, "chat": None}),
        (
            {"chat": {"args": {}, "system": "be long", "day": "1"}},
            {"chat_template_sha256": None, "tokenizer_sha256": None, "chat": None},
        ),
        (
            {"chat": {"args": {}, "system": "be brief", "day": "2"}},
            {"chat": {"args": {}, "system": "be brief", "day": None}},
        ),
    ],
)
def test_what_differs_is_left_out_of_a_union(tmp_path, changes, expected):
    plain = dataclasses.replace(NEXT, prompts=PROMPTS)
    other = dataclasses.replace(plain, **changes)
    for both, known in ((WHOLE | other, WHOLE | plain), (other | WHOLE, plain | WHOLE)):
        found = {name: getattr(both, name) for name in (*claims(both), "positive_mean")}
        if (both.model or {}).get("name") == "n":  # names are not compared: the left one's
            found["model"] = found["model"] | {"name": "m"}
        assert found == claims(WHOLE) | {"positive_mean": known.positive_mean} | expected
        assert is_written(both, tmp_path)


def test_plain_text_stays_plain_text():
    plain = dict(chat_template_sha256=None, chat=None)
    both = dataclasses.replace(WHOLE, **plain) | dataclasses.replace(NEXT, **plain)
    assert (both.tokenizer_sha256, both.chat_template_sha256, both.chat) == ("k", None, None)


@pytest.mark.parametrize("operation", ["__or__", "__and__", "__sub__"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 4}, "n_layers: the circuits are of different models: 3 and 4"),
        ({"n_neurons": 11}, "n_neurons: the circuits are of different models: 10 and 11"),
        ({"model": {"name": "m", "tensors_sha256": "u"}}, "model.tensors_sha256: the circuits are of different models"),
        ({"model": {"name": "m", "decoder_sha256": "e"}}, "model.decoder_sha256: .* different models: d and e"),
        ({"tokenizer_sha256": "l"}, "tokenizer_sha256: the circuits are of different models: k and l"),
    ],
)
def test_circuits_of_different_models_are_refused(operation, changes, said):
    with pytest.raises(InputError, match=said):
        getattr(WHOLE, operation)(dataclasses.replace(NEXT, **changes))


def test_what_is_no_circuit_is_refused():
    for call in (lambda: WHOLE | {(0, 3)}, lambda: WHOLE & None, lambda: WHOLE - [(0, 3)]):
        with pytest.raises(TypeError, match="unsupported operand"):
            call()


def test_a_union_of_aligned_circuits(tmp_path):
    left, right = WHOLE.aligned(), NEXT.aligned()
    assert left.mirrored == ((0, 3), (1, 6)) and right.mirrored == ((0, 3),)
    both = left | right
    assert set(both.mirrored) == {(0, 3), (1, 6)} and set((right | left).mirrored) == {(0, 3)}
    assert is_written(both, tmp_path) and both.aligned() is both
    assert set(both.mirrored) == set((WHOLE | NEXT).aligned().mirrored), "as the neurons' own means and contrasts say"
    for pair in ((left, NEXT), (WHOLE, right)):
        with pytest.raises(InputError, match="mirrored: one circuit is aligned and the other is not"):
            pair[0] | pair[1]


def test_what_a_circuit_was_made_from(tmp_path):
    """The hash is that of the file, and a union of unions names all its circuits."""
    WHOLE.save(tmp_path / "whole.json")
    file = hashlib.sha256((tmp_path / "whole.json").read_bytes()).hexdigest()
    third = dataclasses.replace(NEXT, neurons=((2, 9, 1.0),), positive_mean=None)
    both, shared, three = WHOLE | NEXT, WHOLE & NEXT, WHOLE | NEXT | third
    assert both.made_from["operation"] == "union" and shared.made_from["operation"] == "intersection"
    assert both.made_from["circuits"] == shared.made_from["circuits"] == three.made_from["circuits"][:2]
    assert both.made_from["circuits"][0] == {"k": 5, "prompts": PROMPTS, "sha256": file}
    assert [made["k"] for made in three.made_from["circuits"]] == [5, 4, 1] and three.k_rule == "union of 3 circuits"
    mixed = shared | third
    assert [made["k"] for made in mixed.made_from["circuits"]] == [2, 1] and is_written(mixed, tmp_path)
    assert mixed.made_from["circuits"][0]["made_from"] == shared.made_from
    assert [made["k"] for made in (both.top(2) | third).made_from["circuits"]] == [2, 1], "a part is no union"
    known = [found["positive"]["sha256"] for found in prompts_of(mixed.prompts, mixed.made_from)]
    assert known == ["p", "p", "q", "q"], "its left circuit, what that was made from, its right one"
    assert "made_from" not in json.loads(WHOLE.to_json()), "files of other circuits are as before"


MADE = {"operation": "union", "circuits": [{"k": 1, "prompts": None, "sha256": "x"}]}


@pytest.mark.parametrize(
    ("made_from", "said"),
    [
        ([], "made_from: expected a JSON object"),
        (MADE | {"operation": "xor"}, "made_from.operation: expected difference or intersection or union, got 'xor'"),
        (MADE | {"circuits": [3]}, r"made_from.circuits\[0\]: expected a JSON object, got 3"),
        (MADE | {"circuits": [{"sha256": "x"}]}, r"made_from.circuits\[0\].k: is missing"),
        (MADE | {"circuits": [{"k": 1}]}, r"made_from.circuits\[0\].sha256: is missing"),
        (MADE | {"circuits": [{"k": 1, "sha256": "x", "prompts": {}}]}, r"circuits\[0\].prompts.positive: is missing"),
        (MADE | {"circuits": [{"k": 1, "sha256": "x", "of": 1}]}, r"circuits\[0\].of: not a field of a circuit file"),
        (
            MADE | {"circuits": [{"k": 1, "sha256": "x", "made_from": 3}]},
            r"circuits\[0\].made_from: expected a JSON object",
        ),
        (
            MADE | {"circuits": [{"k": 1, "sha256": "x", "made_from": MADE | {"operation": 1}}]},
            r"circuits\[0\].made_from.operation: expected difference",
        ),
        (MADE | {"by": "me"}, "made_from.by: not a field of a circuit file"),
    ],
)
def test_made_from_is_checked(made_from, said):
    record = json.loads((WHOLE | NEXT).to_json())
    assert Circuit.from_record(record | {"made_from": MADE}, "c.json").made_from == MADE
    with pytest.raises(InputError, match=f"c.json: .*{said}"):
        Circuit.from_record(record | {"made_from": made_from}, "c.json")


# As a table.


def test_a_table_of_the_neurons():
    pytest.importorskip("pandas")
    table = WHOLE.aligned().to_pandas()
    assert list(table.columns) == ["layer", "index", "contrast", "positive_mean", "frequency", "mirrored"]
    assert [tuple(row) for row in table[["layer", "index", "contrast"]].itertuples(index=False)] == list(NEURONS)
    assert table["positive_mean"].tolist() == list(MEANS) and table["frequency"].tolist() == BOOTSTRAP["frequency"]
    assert table["mirrored"].tolist() == [False, True, False, True, False]
    assert [str(kind) for kind in table.dtypes] == ["int64", "int64", "float64", "float64", "float64", "bool"]
    assert list((WHOLE | NEXT).to_pandas().columns) == ["layer", "index", "contrast", "positive_mean"]
    empty = Circuit((), 3, 10).to_pandas()
    assert len(empty) == 0 and [str(kind) for kind in empty.dtypes] == ["int64", "int64", "float64"]


def test_a_table_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r'^pandas: not installed: pip install "cna-kernels\[pandas\]"'):
        WHOLE.to_pandas()


def test_the_table_of_a_mixture_names_experts():
    pytest.importorskip("pandas")
    mixture = Circuit(((1, 11, 2.0), (0, 11, -1.0), (1, 4, 0.5)), 2, 15, experts=((1, 12), (3, 5)))
    table = mixture.to_pandas()
    assert table["expert"].tolist() == [2, 0, 0] and table["expert_index"].tolist() == [1, 11, 4]
    assert table["index"].tolist() == [11, 11, 4]


def test_sets_of_a_mixtures_circuits():
    one, other = (Circuit(((1, index, 2.0),), 2, 15, experts=((1, 12), (3, 5))) for index in (3, 7))
    unknown = Circuit(((0, 1, 1.0),), 2, 15)
    assert (one | other).experts == (unknown | one).experts == one.experts
    with pytest.raises(InputError, match="experts: the circuits are of different models"):
        one | Circuit(((0, 1, 1.0),), 2, 15, experts=((1, 15), (5, 3)))
