"""What is counted in generated text: refusals, repetition, and answers too short to judge.

The published quality is 1 - the share of repeated word n-grams, with n not given; 4 is what the authors' public code
uses. A text of fewer than 4 words has no 4-gram and scores 1.0, so short answers are counted beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

NGRAM = 4


def ngram_quality(units: Sequence) -> float:
    """Return distinct 4-grams over 4-grams, 1.0 where there are none. ``units`` are words or token ids."""
    ngrams = [tuple(units[start : start + NGRAM]) for start in range(len(units) - NGRAM + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def summarise(answers: Sequence[str], is_refusal: Callable[[str], bool]) -> dict[str, float]:
    """Return the shares of refusals, short (under four words) and empty answers, and the mean word 4-gram quality."""
    n = len(answers)
    return {
        "n": n,
        "refusal": sum(map(is_refusal, answers)) / n,
        "quality": sum(ngram_quality(text.split()) for text in answers) / n,
        "short": sum(len(text.split()) < NGRAM for text in answers) / n,
        "empty": sum(not text.strip() for text in answers) / n,
    }


def share_equal(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of answers that equal, character for character, what is expected of them."""
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(answers)
