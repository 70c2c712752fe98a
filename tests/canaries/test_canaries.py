"""Every bug that `make canaries` plants has its place in the source as it is now."""

import pytest

from plant import CANARIES, ROOT


@pytest.mark.parametrize("canary", CANARIES, ids=[canary.bug for canary in CANARIES])
def test_the_line_to_change_stands_once(canary):
    assert (ROOT / canary.file).read_text().count(canary.right) == 1 and canary.wrong != canary.right
    assert (ROOT / canary.tests).exists()
