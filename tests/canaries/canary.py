"""What a planted bug is."""

from typing import NamedTuple


class Canary(NamedTuple):
    """A replacement in one source file, and the test that must fail with it and pass without it."""

    bug: str
    file: str  # from the repository's root
    right: str  # stands once in the file
    wrong: str
    tests: str  # the file of the test
    test: str  # pytest -k
