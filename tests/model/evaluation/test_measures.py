"""What each kind of measure sees in an answer, and what it does not."""

import pytest
import torch

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields
from cna_kernels.model.evaluation.measures import FUNCTION_WORDS, Item, holds_json, language_of, measure_of

LIMA = Item("The capital of Peru is", "file: measured[0]", ("Lima",))
PLAIN = Item("a prompt", "file: measured[1]")


def measure(**fields):
    return measure_of(Fields(fields, "file", "measure."))


TEXTS = [
    # measure, item, answer, whether the behaviour is there
    (dict(kind="contains"), LIMA, "It is LIMA, by the sea.", True),
    (dict(kind="contains"), LIMA, "Limassol is far away.", False),
    (dict(kind="contains"), LIMA, "<think>Lima?</think>I do not know.", False),
    (dict(kind="contains"), LIMA, "<think>I do not know.</think>Lima.", True),
    (dict(kind="contains"), LIMA, "<think>Lima is", False),
    (dict(kind="contains"), Item("x", "p", ("New  York", "NY")), "In new\nyork!", True),
    (dict(kind="contains"), Item("x", "p", ("C++",)), "Use C++, not C.", True),
    (dict(kind="contains"), Item("x", "p", ("a.b",)), "axb", False),
    (dict(kind="refusal"), PLAIN, "I'm sorry, but I can't help with that.", True),
    (dict(kind="refusal", list="strict"), PLAIN, "Mix the flour with the water.", False),
    (dict(kind="phrases", phrases=["the sea", "ship"]), PLAIN, "The SEA is wide.", True),
    (dict(kind="phrases", phrases=["the sea", "ship"]), PLAIN, "The season of shipping.", False),
    (dict(kind="regex", pattern=r"\b\d{4}\b"), PLAIN, "It was 1789.", True),
    (dict(kind="regex", pattern=r"\b\d{4}\b"), PLAIN, "It was 17899.", False),
    (dict(kind="language", language="fr"), PLAIN, "Les chats sont des animaux qui aiment la nuit et le poisson.", True),
    (dict(kind="language", language="fr"), PLAIN, "Cats are animals that love the night and fish.", False),
    (dict(kind="json"), PLAIN, '{"name": "cat", "legs": 4}', True),
    (dict(kind="json"), PLAIN, "A cat has four legs.", False),
]


@pytest.mark.parametrize(("fields", "item", "answer", "there"), TEXTS, ids=[each[2][:30] for each in TEXTS])
def test_of_texts(fields, item, answer, there):
    assert measure(**fields).of_texts([answer], [item]) == [there]


JSON = [
    ('Here it is:\n```json\n{"a": [1, 2]}\n```\nDone.', True),
    ("```\n[1, 2]\n```", True),
    ('It is {"a": 1} as you see.', True),
    ("{}", False),
    ("[]", False),
    ('"text"', False),
    ("{a: 1}", False),
    ('{"a": 1', False),
    ("Use {braces} and [brackets].", False),
    ("[" * 100_000, False),
    ("", False),
]


@pytest.mark.parametrize(("text", "there"), JSON, ids=[each[0][:20] for each in JSON])
def test_json(text, there):
    assert holds_json(text) == there


SENTENCES = {
    "de": "Die Katze sitzt auf dem Tisch und wartet, weil sie nicht in den Garten gehen darf.",
    "en": "The cat sits on the table and waits, for it is not allowed to go to the garden.",
    "es": "El gato está en la mesa y espera, porque no puede salir al jardín con los niños.",
    "fr": "Le chat est sur la table et il attend, parce que les enfants sont dans le jardin.",
    "it": "Il gatto è sulla tavola e aspetta, perché non può andare nel giardino con gli altri.",
    None: "42, 43, 44; OK",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_language(language):
    assert language_of(SENTENCES[language]) == language
    assert set(FUNCTION_WORDS) == {key for key in SENTENCES if key}


class Letters:
    """Stands in for a tokenizer: the first id of a text is that of its first letter."""

    def first_ids(self, texts, what):
        return [ord(text.strip()[0]) - ord("a") for text in texts]


def logits(**values):
    row = torch.full((26,), -5.0)
    for letter, value in values.items():
        row[ord(letter) - ord("a")] = value
    return row


@pytest.mark.parametrize(
    ("row", "top", "pair"),
    [
        (logits(a=1, b=0), True, True),
        (logits(a=1, b=2), False, False),
        (logits(a=1, b=0, z=9), False, True),  # another token is likelier than both
        (logits(c=1, b=0), True, True),  # the second of two answers
        (logits(a=1, b=0, d=3), False, False),  # the second of two others
    ],
)
def test_of_logits(row, top, pair):
    item = Item("x", "p", (" a", " c"), (" b", " d"))
    assert measure(kind="next token").of_logits(row, item, Letters()) == top
    assert measure(kind="pair").of_logits(row, item, Letters()) == pair


def test_pairs_that_begin_alike_are_refused():
    with pytest.raises(InputError, match="begins with the same token as an answer"):
        measure(kind="pair").of_logits(logits(a=1), Item("x", "p", (" ab",), (" ac",)), Letters())


def test_judge(tmp_path):
    program = tmp_path / "judge.py"
    program.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    item = json.loads(line)\n"
        "    print(json.dumps({'id': item['id'], 'score': len(item['answer']) / 10}))\n"
    )
    import sys

    judged = measure(kind="judge", command=f"{sys.executable} {program}", least=0.45)
    assert judged.of_texts(["four", "fives", "<think>long enough</think>no"], [PLAIN] * 3) == [False, True, False]


FAULTS = [
    (dict(), "measure.kind: is missing"),
    (dict(kind="vibes"), "measure.kind: expected contains or json"),
    (dict(kind="json", language="fr"), "measure.language: not a field of the measure 'json'"),
    (dict(kind="refusal", list="mine"), "measure.list: expected broad or strict"),
    (dict(kind="phrases", phrases=[]), "measure.phrases: holds no phrase"),
    (dict(kind="phrases", phrases=[" "]), "measure.phrases[0]: expected a phrase"),
    (dict(kind="regex", pattern="("), "measure.pattern: is no regular expression"),
    (dict(kind="language", language="tlh"), "measure.language: expected de or en"),
    (dict(kind="judge"), "measure.command: is missing"),
]


@pytest.mark.parametrize(("fields", "what"), FAULTS, ids=[each[1] for each in FAULTS])
def test_faults(fields, what):
    with pytest.raises(InputError) as caught:
        measure(**fields)
    assert f"file: {what}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "item", "what"),
    [
        ("contains", PLAIN, "measured[1].answer: is missing"),
        ("pair", LIMA, "measured[0].other: is missing"),
        ("json", LIMA, "measured[0].answer: is not for 'json'"),
    ],
)
def test_answers_that_a_kind_asks_for(kind, item, what):
    with pytest.raises(InputError) as caught:
        measure(kind=kind).check(item)
    assert what in str(caught.value)
