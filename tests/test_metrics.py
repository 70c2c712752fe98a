"""Text metrics on texts whose numbers are known by hand."""

from cna_kernels.model.metrics import ngram_quality, share_equal, summarise


def test_quality_of_known_texts():
    assert ngram_quality("a b c d e f".split()) == 1.0
    assert ngram_quality(["a"] * 7) == 1 / 4  # four 4-grams, all the same
    assert ngram_quality("a b c d a b c d".split()) == 4 / 5  # abcd twice of five
    assert ngram_quality("too short here".split()) == 1.0 and ngram_quality([]) == 1.0
    assert ngram_quality([1, 1, 1, 1, 1]) == 1 / 2


def test_summary_counts_short_and_empty_answers():
    answers = ["Sorry, I cannot help with that.", "", "no no", "one two three four five"]
    summary = summarise(answers, lambda text: "sorry" in text.lower())
    assert summary == {"n": 4, "refusal": 0.25, "quality": 1.0, "short": 0.5, "empty": 0.25}


def test_share_equal():
    assert share_equal(["a", "b", "c"], ["a", "B", "c"]) == 2 / 3
