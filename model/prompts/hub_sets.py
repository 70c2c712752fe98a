"""Prompt sets on the Hugging Face Hub, wherever a prompt file is read: their rows, one after the other, by `datasets`.

    hf:org/set:SPLIT                a split of a data set
    hf:org/set/CONFIG:SPLIT         of a set that has several configurations; @REVISION behind set or configuration
    hf:org/set:SPLIT:400            the first 400 rows of it
    hf:org/set:SPLIT:COLUMN         the column that holds the prompt, as FILE:COLUMN; also behind the number of rows

Rows are streamed: nothing behind the rows that are used is downloaded but what lies in one piece with them. Offline the
copy is read that `datasets` has prepared before. No code of a data set is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cna_kernels.errors import InputError
from cna_kernels.files import FilePath

from ..hub.names import HubName
from ..packages import require

PREFIX = "hf:"
_WORD = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_SET = re.compile(
    rf"hf:(?P<repo>{_WORD}/{_WORD})(?:/(?P<config>[^:@/]+))?(?:@(?P<revision>[^:@\s]+))?:(?P<split>[A-Za-z0-9_.-]+)"
    r"(?::(?P<rows>\d{1,15}))?(?::(?P<column>(?!\d+$)[^:]+))?"
)
_FORM = "expected hf:org/set:split, hf:org/set/config:split or hf:org/set@revision:split, then :ROWS and :COLUMN"
_CODE_FREE = 4  # the first version of datasets that runs no code of data sets


@dataclass(frozen=True)
class HubSet(HubName):
    """A split of a data set.

    Attributes:
        config: its configuration; None where it has one only.
        split: the name of the split.
        rows: use the first so many rows; None for all.
        column: the column that holds the prompt, or None.
    """

    config: str | None = None
    split: str = ""
    rows: int | None = None
    column: str | None = None

    def __str__(self) -> str:
        config = "" if self.config is None else f"/{self.config}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{PREFIX}{self.repo}{config}{revision}:{self.split}"


def hub_set(path: FilePath) -> HubSet | None:
    """The data set that stands in the place of a file; None for a file. What exists as a file is a file.

    Raises:
        InputError: a name that begins with ``hf:`` has another form.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX) or os.path.lexists(text):
        return None
    found = _SET.fullmatch(text)
    rows = None if found is None or found["rows"] is None else int(found["rows"])
    if found is None or rows == 0:
        raise InputError(text, _FORM)
    of_hub = dict(repo=found["repo"], revision=found["revision"], config=found["config"])
    return HubSet(**of_hub, split=found["split"], rows=rows, column=found["column"])


def rows_of(found: HubSet) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a data set, each with its place: ``hf:org/set:split: row N``, counted from 0.

    Raises:
        InputError: `datasets` is not installed; or the set cannot be read: names the set, and what to do.
    """
    require("datasets")
    rows = islice(_open(found), found.rows)
    number = 0
    while True:
        with _errors(found):
            row = next(rows, None)
        if row is None:
            return
        yield row, f"{found}: row {number}"
        number += 1


def _open(found: HubSet) -> Iterator[dict[str, Any]]:
    import datasets
    from huggingface_hub import constants

    if int(datasets.__version__.partition(".")[0]) < _CODE_FREE:
        what = f"datasets {datasets.__version__} may run code of a data set; {_CODE_FREE} and later run none"
        raise InputError("datasets", what)
    if os.path.isdir(found.repo):
        what = f"the folder {found.repo} here would be read in its place: run in another directory, or name its files"
        raise InputError(str(found), what)
    offline = bool(constants.HF_HUB_OFFLINE)
    if offline and found.revision is not None:
        raise InputError(str(found), "HF_HUB_OFFLINE is set, and offline the revision of a copy is not known")
    with _errors(found):
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            found.repo, found.config, split=found.split, revision=found.revision, streaming=not offline
        )
        return iter(rows)


@contextmanager
def _errors(found: HubSet) -> Iterator[None]:
    """Make every error of `datasets` one line that names the set."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    from ..hub.fetch import errors_of

    with errors_of(found, kind="dataset"):
        try:
            yield
        except DatasetNotFoundError as error:
            text = next(iter(str(error).splitlines()), "not found")
            raise InputError(str(found), f"{text} A private or gated one takes a login (hf auth login)") from None
        except ConnectionError:
            if not constants.HF_HUB_OFFLINE:
                raise
            once = f"datasets.load_dataset({found.repo!r}) online makes one"
            raise InputError(str(found), f"HF_HUB_OFFLINE is set, and there is no prepared copy; {once}") from None
        except ValueError as error:  # no such configuration or split; or none named, where there are several
            text = " ".join(line.strip() for line in str(error).partition("Example of usage")[0].splitlines())
            hint = "; name one: hf:org/set/config:split" if "onfig" in text else ""
            raise InputError(str(found), text.strip() + hint) from None
