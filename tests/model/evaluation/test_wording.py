"""Where a phrase is found in a text, and what counts as a unit."""

import pytest

from cna_kernels.model.evaluation.wording import holds, units

HOLDS = [
    # text, phrase, whether it is held
    ("By the sea.", "the sea", True),
    ("The season", "the sea", False),
    ("Bathe sea lions", "the sea", False),
    ("The season by the sea", "the sea", True),  # the second place
    ("THE\n sea", "the  SEA", True),
    ("Stra\u00dfe", "STRASSE", True),
    ("Use C++, not C.", "C++", True),
    ("ABC++", "C++", False),
    ("It is 17899.", "1789", False),
    ("It is 2*3.", "23", False),  # a product, not emphasis
    ("It is 2**3.", "23", False),
    ("It is **23**.", "23", True),
    ("I can**not** go", "cannot", True),
    ("snake_case", "case", False),
    ("snake_case", "snake_case", True),
    ("`case`", "case", True),
    ("- > ## the sea", "the sea", True),
    ("a\u0304b x\u0304", "x", False),  # an accent that has no character with its letter
    ("\u0915\u093f", "\u0915", False),  # Devanagari: a vowel's sign belongs to the word
    # scripts without spaces between words
    ("\u7b54\u6848\u662f\u5317\u4eac\u5e02", "\u5317\u4eac", True),  # Han
    ("\u3053\u308c\u306fGPT\u3067\u3059", "GPT", True),  # Latin within Japanese
    ("\u6771\u4eac\u306b\u3044\u308b", "\u6771\u4eac", True),
    (
        "\u0e43\u0e19\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
        "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
        True,
    ),  # Thai
    ("\uc11c\uc6b8\uc740", "\uc11c\uc6b8", True),  # Korean: a particle follows
    ("text", "", False),
    ("", "text", False),
]


@pytest.mark.parametrize(("text", "phrase", "held"), HOLDS, ids=[f"{each[1]!a} in {each[0]!a}" for each in HOLDS])
def test_holds(text, phrase, held):
    assert holds(text, phrase) == held


@pytest.mark.parametrize(
    ("text", "phrase", "held"),
    [
        ("No, thanks", "no", True),
        ("> **No**, thanks", "no", True),
        ("Oh no", "no", False),
        ("Nothing", "no", False),
        ("No", "no", True),
        ("no\u3067\u3059", "no", True),
    ],
    ids=ascii,
)
def test_holds_at_the_beginning(text, phrase, held):
    assert holds(text, phrase, at_start=True) == held


def test_units():
    assert units("Take the key.") == ["Take", "the", "key."]
    assert units("\u8bf7\u7528 GPT4\u5427") == ["\u8bf7", "\u7528", "GPT4", "\u5427"]
