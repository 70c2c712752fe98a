"""Every bug that `make canaries` plants has its place in the kernels as they are now."""

import pytest
from canaries import CANARIES, ROOT


@pytest.mark.parametrize("canary", CANARIES, ids=[canary.bug for canary in CANARIES])
def test_the_line_to_change_stands_once(canary):
    text = (ROOT / "cna_kernels" / "triton" / canary.file).read_text()
    assert text.count(canary.right) == 1 and canary.wrong != canary.right
