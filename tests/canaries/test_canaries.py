"""Every bug that `make canaries` plants has its place in the source as it is now."""

import re

import pytest

from plant import CANARIES, ROOT


@pytest.mark.parametrize("canary", CANARIES, ids=[canary.bug for canary in CANARIES])
def test_the_line_to_change_stands_once(canary):
    assert (ROOT / canary.file).read_text().count(canary.right) == 1 and canary.wrong != canary.right
    tests = (ROOT / canary.tests).read_text()
    assert all(f"def {name}" in tests for name in re.findall(r"\btest_\w+", canary.test))
