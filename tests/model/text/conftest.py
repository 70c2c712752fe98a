"""A directory with the text files of a tiny checkpoint."""

import pytest

from tiny import write_text_files


@pytest.fixture
def directory(tmp_path):
    write_text_files(tmp_path)
    return tmp_path
