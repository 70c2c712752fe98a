"""A few of all cases, chosen so that every pair of parameter values that occurs in any case occurs in a chosen case.

The everyday tests run the chosen cases, a covering array of the full product; the others are marked ``rare``.
Most faults show with two values together, nearly all with three (D. R. Kuhn et al., IEEE Transactions on Software
Engineering 30, 2004).
"""

from itertools import combinations

import pytest


def covering(cases, strength=2):
    """The cases that cover every pair of values, or every ``strength`` values; chosen greedily, ties to the first.

    Args:
        cases: tuples of one length with hashable values. Values that cannot go together are in no case.
    """
    number = {}

    def bits(case):
        together = combinations(enumerate(case), strength)
        return sum(1 << number.setdefault(values, len(number)) for values in together)

    covers = [bits(case) for case in cases]
    chosen, missing = [], (1 << len(number)) - 1
    while missing:
        best = max(range(len(cases)), key=lambda place: (covers[place] & missing).bit_count())
        chosen.append(best)
        missing &= ~covers[best]
    return [cases[place] for place in sorted(chosen)]


def parameters(cases, ids, strength=2, everyday=lambda case: True):
    """pytest's parameters for all cases. Without a mark are the few that cover the ``everyday`` cases; ``exhaustive``
    are the few that cover the other cases; all the rest are ``rare``.
    """
    chosen = set(covering([case for case in cases if everyday(case)], strength))
    others = set(covering([case for case in cases if not everyday(case)], strength))

    def how_often(case):
        return () if case in chosen else pytest.mark.exhaustive if case in others else pytest.mark.rare

    return [pytest.param(*case, id=name, marks=how_often(case)) for case, name in zip(cases, ids, strict=True)]
