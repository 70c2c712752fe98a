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
    (dict(kind="contains"), LIMA, "It is _Lima_.", True),
    (dict(kind="contains"), LIMA, "**Lima**", True),
    (dict(kind="contains"), LIMA, "It is Lima\u2019s.", True),
    (dict(kind="contains"), Item("x", "p", ("\u5317\u4eac",)), "\u7b54\u6848\u662f\u5317\u4eac\u5e02\u3002", True),
    (dict(kind="contains"), Item("x", "p", ("\uc11c\uc6b8",)), "\uc11c\uc6b8\uc740 \uc218\ub3c4\uc774\ub2e4", True),
    (dict(kind="contains"), Item("x", "p", ("S\u00e3o Tom\u00e9",)), "It is Sa\u0303o Tome\u0301.", True),
    (dict(kind="contains"), Item("x", "p", ("Sa\u0303o Tome\u0301",)), "It is S\u00e3o Tom\u00e9.", True),
    (dict(kind="contains"), Item("x", "p", ("cafe",)), "the cafe\u0301", False),
    (dict(kind="contains"), Item("x", "p", ("case",)), "snake_case", False),
    (dict(kind="phrases", phrases=["I don't know"]), PLAIN, "Well, I don\u2019t know.", True),
    (dict(kind="phrases", phrases=["I don\u2019t know"]), PLAIN, "Well, I don't know.", True),
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
    # a thought that does not end
    (dict(kind="regex", pattern=r"\A(?!.*sorry)"), PLAIN, "<think>I am", False),
    (dict(kind="regex", pattern=r"\A(?!.*sorry)"), PLAIN, "<think>I am</think>Yes.", True),
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
    ("[" * 100_000 + "]" * 100_000, False),  # too deep to be read
    ("[" * 100_000 + "]" * 100_000 + '{"a": 1}', True),
    ("[x] " * 50_000, False),
    ('{"' + '\\"' * 50_000, False),
    ("", False),
    # numbers
    ("Cats are mammals [1] and sleep a lot [2].", False),
    ('Cats are mammals [1]: {"legs": 4}', True),
    ("Cats are mammals [1]: [true, 4]", True),
    (" [1, 2]\n", True),
    # only outermost values
    ('{"name": "cat", "tags": ["a", "b"], "desc": "a long', False),
    ('{"name": "cat", "legs": 4, "desc": "a long', False),
    ('{name: "cat", tags: ["a", "b"]}', False),
    ('{"a": "}", b: ["c"]}', False),  # a bracket in a string
    ('Fill in {name: ["x"]}, as {"name": "cat"}.', True),
    ("It is {} or [].", False),
    ('```json\n{"tags": ["a"], "desc": "a', False),
    # fences
    ("Numbers:\n```JSON\n[1, 2]\n```", True),
    ("```python\n[1, 2]\n```\nor\n```python\n[3]\n```", False),
    ("```json\n{}\n```", False),
]


@pytest.mark.parametrize(("text", "there"), JSON, ids=[each[0][-30:] for each in JSON])
def test_json(text, there):
    assert holds_json(text) == there


SENTENCES = [
    ("de", "Die Katze sitzt auf dem Tisch und wartet, weil sie nicht in den Garten gehen darf."),
    ("de", "Musik ist eine Kunst, die ich mag."),
    ("de", "Ich bin mit dem Hund im Garten."),
    ("en", "The cat sits on the table and waits, for it is not allowed to go to the garden."),
    ("en", "Music is an art that I like."),
    ("en", "I don\u2019t know, but it\u2019s in the garden."),
    ("en", "I'd say it's l'art that they can't do."),
    ("es", "El gato est\u00e1 en la mesa y espera, porque no puede salir al jard\u00edn con los ni\u00f1os."),
    ("es", "La m\u00fasica es un arte."),
    ("es", "Mi perro est\u00e1 en el jard\u00edn."),
    ("fr", "Le chat est sur la table et il attend, parce que les enfants sont dans le jardin."),
    ("fr", "La musique est un art."),
    ("fr", "Bonjour, je suis un chat noir et j'aime dormir."),
    ("fr", "J\u2019aime l\u2019eau qu\u2019elle boit."),
    ("fr", "Bien s\u00fbr ! Voici une phrase : J'aime beaucoup \u00e9couter de la musique classique."),
    ("fr", "Le cafe\u0301 est tre\u0300s bon."),  # accents as characters of their own
    ("it", "Il gatto \u00e8 sulla tavola e aspetta, perch\u00e9 non pu\u00f2 andare nel giardino con gli altri."),
    ("it", "La musica \u00e8 un'arte."),
    ("it", "L\u2019acqua dell\u2019isola \u00e8 blu."),
    (None, "42, 43, 44; OK"),
    (None, "The cat sleeps."),  # too few
    (None, "It's 'c', 'd' or 'l'."),  # letters, not what is left of a word
    (
        None,
        "O gato est\u00e1 na mesa e n\u00e3o pode sair com a m\u00e3e.",
    ),  # Portuguese: as many words of two languages
    (None, "De kat zit op de tafel en wacht."),  # Dutch: the same
]


@pytest.mark.parametrize(("language", "text"), SENTENCES, ids=[each[1][:30] for each in SENTENCES])
def test_language(language, text):
    assert language_of(text) == language


def test_every_language_has_sentences():
    assert set(FUNCTION_WORDS) == {language for language, _ in SENTENCES if language}


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
    # a thought that does not end has no score; the scores of the others stay theirs
    anything = measure(kind="judge", command=judged.command, least=0.0)
    assert anything.of_texts(["<think>long", "fives"], [PLAIN] * 2) == [False, True]
    assert judged.of_texts(["<think>long enough", "fives", "no"], [PLAIN] * 3) == [False, True, False]
    assert measure(kind="judge", command="no such program").of_texts(["<think>long"], [PLAIN]) == [False]


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
