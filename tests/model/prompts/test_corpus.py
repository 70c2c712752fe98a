"""A run's prompts on file: entries come back equal in units of any size; counts and hashes; and a changed file."""

import hashlib
import io
import json

import pytest

from cna_kernels import InputError
from cna_kernels.model.prompts import corpus as module
from cna_kernels.model.prompts.corpus import (
    Contrast,
    Corpus,
    Entry,
    Names,
    contrasts_of,
    entries_of,
    read_contrasts,
    two_sets,
    with_answers,
)
from cna_kernels.model.prompts.files import BadLines


def names_of(*columns):
    names = Names()
    for column in columns:
        names(column)
    return names


def mixed(n=40):
    """Entries of two columns, with odd weights, letters of several bytes and answers, and universal entries."""
    found = []
    for number in range(n):
        columns = [(0, 1.0, 0)] * (number % 3 != 1) + [(1, 0.25 + number, 0)] * (number % 3 > 0)
        universal, answer = number % 7 == 6, "yes\n" if number % 2 else None
        text = f'"é\u2028{number}" ' * (number % 5 + 1)
        found.append(Entry(text, f"f:{number}", () if universal else tuple(columns), universal, answer))
    return found


def numbered(entries):
    """The entries with the turn of each prompt in each column, counted by hand."""
    seen, found = {}, []
    for entry in entries:
        columns = []
        for column, weight, _ in entry.columns:
            columns.append((column, weight, seen.get(column, 0)))
            seen[column] = seen.get(column, 0) + 1
        found.append(entry._replace(columns=tuple(columns)))
    return found


def all_of(corpus):
    return [entry for number in range(len(corpus.units)) for entry in corpus.read(number)]


@pytest.mark.parametrize("unit", [None, 1, 7, 40, 1000])
def test_entries_come_back_whatever_the_cut(unit):
    corpus = Corpus(io.BytesIO(), mixed(), names_of("a", "b"), unit=unit)
    assert all_of(corpus) == numbered(mixed()) and corpus.n_prompts == 40
    firsts = [each.first for each in corpus.units]
    assert firsts == [sum(each.n_prompts for each in corpus.units[:number]) for number in range(len(firsts))]
    assert all(each.n_prompts <= (unit or 1024) for each in corpus.units)
    assert len(corpus.units) == -(-40 // (unit or 1024))
    for number in reversed(range(len(corpus.units))):  # in any order
        start = corpus.units[number].first
        assert corpus.read(number) == numbered(mixed())[start : start + corpus.units[number].n_prompts]


def test_units_end_where_their_text_or_their_universal_prompts_are_many(monkeypatch):
    monkeypatch.setattr(module, "UNIT_BYTES", 3000)
    longest = max(len(json.dumps(entry, ensure_ascii=False).encode()) for entry in mixed())
    corpus = Corpus(io.BytesIO(), mixed(), names_of("a", "b"))
    ends = [*(each.offset for each in corpus.units[1:]), corpus._file.seek(0, 2)]
    sizes = [end - each.offset for end, each in zip(ends, corpus.units, strict=True)]
    assert len(sizes) > 1 and max(sizes) <= 3000 and min(sizes[:-1]) > 3000 - longest - 1
    streamed = Corpus(io.BytesIO(), mixed(), names_of("a", "b"), streamed=True)
    assert len(streamed.units) == 1, "every unit reads the whole checkpoint"
    monkeypatch.setattr(module, "UNIT_UNIVERSAL", 2)
    corpus = Corpus(io.BytesIO(), entries_of((str(n), "p") for n in range(7)), Names())
    assert [each.n_prompts for each in corpus.units] == [2, 2, 2, 1]


def test_counts_weights_and_hashes():
    corpus = Corpus(io.BytesIO(), mixed(), names_of("a", "b"), unit=9)
    for key, universal in (("0", False), ("1", False), (module.UNIVERSAL, True)):
        members = [
            (entry.text, 1.0 if universal else weight)
            for entry in mixed()
            if entry.universal == universal
            for column, weight in ([(key, 1.0)] if universal else [(str(c), w) for c, w, _ in entry.columns])
            if column == key
        ]
        assert corpus.count[key] == len(members) > 0
        assert corpus.weight[key] == pytest.approx(sum(weight for _, weight in members))
    texts = [[(text, f"{place}:{n}") for n, text in enumerate("xyz")] for place in "ab"]
    sides = [Corpus(io.BytesIO(), two_sets(names := Names(), *pair), names) for pair in (texts, texts[::-1])]
    assert sides[0].digests["0"] == sides[0].digests["1"] == sides[1].digests["0"], "of the texts alone"
    assert sides[0].columns == ("positive", "negative")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda e: e._replace(place="elsewhere:1"), True),
        (lambda e: e._replace(text=e.text + "!"), False),
        (lambda e: e._replace(columns=((0, 1.5, 0),)), False),
        (lambda e: e._replace(columns=((1, 1.0, 0),)), False),
        (lambda e: e._replace(answer="no"), False),
        (lambda e: e._replace(columns=(), universal=True), False),
    ],
    ids=["place", "text", "weight", "column", "answer", "universal"],
)
def test_the_hash_is_of_everything_but_the_places(change, same):
    def hashed(entries, *columns, **options):
        return Corpus(io.BytesIO(), entries, names_of(*columns), **options).sha256

    plain = hashed(mixed(), "a", "b")
    changed = [change(entry) if number == 3 else entry for number, entry in enumerate(mixed())]
    assert (hashed(changed, "a", "b") == plain) == same and len(plain) == len(hashlib.sha256().hexdigest())
    assert plain not in (hashed(mixed(), "a", "c"), hashed(mixed(), "a", "b", unit=7), hashed(mixed()[::-1], "a", "b"))


def test_a_copy_is_opened_by_its_record(tmp_path):
    corpus = Corpus(io.BytesIO(), mixed(), names_of("a", "b"), unit=6)
    corpus.copy_to(tmp_path / "prompts")
    again = Corpus.open(tmp_path / "prompts", json.loads(json.dumps(corpus.record())))
    assert all_of(again) == all_of(corpus) and again.record() == corpus.record()


@pytest.mark.parametrize("what", ["a letter", "a line less", "a line more"])
def test_a_changed_file_is_refused_where_it_is_read(tmp_path, what):
    corpus = Corpus(io.BytesIO(), mixed(), names_of("a", "b"), unit=6)
    path = tmp_path / "prompts"
    corpus.copy_to(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[13] = {"a letter": lines[13].replace(b"13", b"14", 1), "a line less": b"", "a line more": lines[13] * 2}[what]
    path.write_bytes(b"".join(lines))
    damaged = Corpus.open(path, corpus.record())
    assert damaged.read(0) == corpus.read(0) and damaged.read(1) == corpus.read(1)
    with pytest.raises(InputError, match="prompts: is damaged: unit 2 is not as written"):
        damaged.read(2)


def test_a_contrast_file_as_entries(tmp_path):
    path, names = tmp_path / "c.jsonl", Names()
    lines = [
        {"prompt": "one", "columns": ["a.positive", "b.negative"]},
        {"prompt": "two", "columns": {"a.negative": 0.5, "b.positive": 3}, "answer": "so"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_contrasts(path, names, prefix="x/")
    assert list(names.number) == ["x/a.positive", "x/b.negative", "x/a.negative", "x/b.positive"]
    assert first.columns == ((0, 1.0, 0), (1, 1.0, 0)) and (first.answer, second.answer) == (None, "so")
    assert second.columns == ((2, 0.5, 0), (3, 3.0, 0)) and (second.text, first.universal) == ("two", False)
    assert contrasts_of(names.number, path) == [Contrast("x/a", 0, 2), Contrast("x/b", 3, 1)]
    assert [entry.text for entry in read_contrasts(path, Names(), limit=1)] == ["one"]


@pytest.mark.parametrize("name", ["x" * 201, "é" * 101, ".positive", "a\\b", "a\nb", ".."])
def test_names_that_cannot_be_files(tmp_path, name):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"prompt": "p", "columns": [name]}) + "\n")
    with pytest.raises(InputError, match=r"c\.jsonl:1: columns: expected"):
        list(read_contrasts(path, Names()))


def test_more_columns_than_are_accepted(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "columns": [f"c{n}"]}) + "\n" for n in range(4097)))
    with pytest.raises(InputError, match=r"c\.jsonl:4097: columns: the file names more than the 4096"):
        list(read_contrasts(path, Names()))
    bad, names = BadLines(skip=True), Names()
    assert len(list(read_contrasts(path, names, bad=bad))) == len(names.number) == 4096 and bad.count == 1


def test_entries_without_an_answer():
    entries = [
        Entry("a", "f:1", ((0, 1.0, 0),), answer="x"),
        Entry("b", "f:2", ((0, 1.0, 0),)),
        Entry("c", "u:1", (), True),
    ]
    with pytest.raises(InputError, match="f:2: has no answer"):
        list(with_answers(entries, BadLines()))
    bad = BadLines(skip=True)
    assert [entry.text for entry in with_answers(entries, bad)] == ["a", "c"] and bad.count == 1


def test_a_full_disk_is_one_line():
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="cannot hold the prompts: No space left on device"):
        Corpus(Full(), mixed(), names_of("a", "b"))
