"""The covering cases: every pair of values that occurs together is covered, by few cases."""

from itertools import combinations, product

import pytest

from covering import covering, parameters

FULL = list(product(range(8), range(3), "abcdef", (True, False)))
ALLOWED = [case for case in FULL if not (case[0] == 2 and case[2] in "ab") and (case[1] or case[3])]


def together(cases, strength):
    return {values for case in cases for values in combinations(enumerate(case), strength)}


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("cases", [FULL, ALLOWED], ids=["full", "constrained"])
def test_all_that_occurs_together_is_covered(cases, strength):
    found = covering(cases, strength)
    assert together(found, strength) == together(cases, strength)
    assert len(found) < len(cases) / 1.5 and found == covering(cases, strength)
    assert found == [case for case in cases if case in set(found)], "in their order"


def test_few_are_enough():
    """The two parameters with most values need 8 * 6 cases."""
    assert 48 <= len(covering(FULL)) <= 52 and len(covering(FULL, 1)) == 8


def test_the_others_are_marked():
    found = parameters(FULL, [str(number) for number in range(len(FULL))])
    everyday = [parameter.values for parameter in found if not parameter.marks]
    assert everyday == covering(FULL) and len(found) == len(FULL)
    assert {mark.name for parameter in found for mark in parameter.marks} == {"rare"}
    some = parameters(FULL, map(str, FULL), everyday=lambda case: case[0] < 2)
    assert [p.values for p in some if not p.marks] == covering(FULL[: len(FULL) // 4]) and len(some) == len(FULL)
    others = [p.values for p in some if [mark.name for mark in p.marks] == ["exhaustive"]]
    assert others == covering(FULL[len(FULL) // 4 :])
