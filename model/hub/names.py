"""Names on the Hugging Face Hub, as users write them, and what a place in the Hub's cache says of where it is from.

    org/name                  a repository
    org/name:FILE             a file of it: model.gguf, or a circuit
    org/name@REVISION         a branch, a tag or a commit; also behind a file

Imports nothing heavy.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cna_kernels.circuit_file import COMMIT

_WORD = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(?::(?P<file>[^:@\\]+))?(?:@(?P<revision>[^:@\\\s]+))?")
_CACHED = re.compile(r"models--(?:([\w.-]+?)--)?([\w.-]+)", re.ASCII)  # a folder of the Hub's cache


@dataclass(frozen=True)
class HubName:
    """A repository, or a file of it.

    Attributes:
        repo: ``org/name``.
        file: a file of the repository, or the quantisation of one; None for the repository.
        revision: a branch, a tag or a commit; None for the default branch.
    """

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file = "" if self.file is None else f":{self.file}"
        return f"{self.repo}{file}" + ("" if self.revision is None else f"@{self.revision}")


def hub_name(text: object) -> HubName | None:
    """The name on the Hub that a text is; None where it is a path.

    A path is what exists, what begins with ``.``, ``/`` or ``~``, what has several slashes in front of a ``:`` or
    ``@``, what ends in ``.gguf`` or ``.json`` without a ``:``, and every :class:`pathlib.Path`.
    """
    return parse_name(text) if isinstance(text, str) and not os.path.lexists(text) else None


def parse_name(text: str) -> HubName | None:
    """As :func:`hub_name`, whatever exists here under this name."""
    found = _NAME.fullmatch(text)
    if found is None or found["repo"].endswith((".gguf", ".json")):
        return None
    return HubName(found["repo"], found["file"], found["revision"])


def cached_name(path: str | os.PathLike[str]) -> HubName | None:
    """Where a directory or file in the Hub's cache is from: repository, file and commit; None for other places.

    A snapshot lies in ``models--ORG--NAME/snapshots/COMMIT``. Links that lead to one are followed, but not the link
    that a file of a snapshot is.
    """
    place = Path(os.path.abspath(path))
    if not place.is_dir():
        place = place.parent.resolve() / place.name
    for whole in (place, place.resolve()):
        for folder in (whole, *whole.parents):
            found = _CACHED.fullmatch(folder.parent.parent.name)
            if found and folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
                inside = whole.relative_to(folder).as_posix()
                repo = "/".join(filter(None, found.groups()))
                return HubName(repo, None if inside == "." else inside, folder.name)
    return None


def checkpoint_name(path: str | os.PathLike[str]) -> str:
    """The name that circuits record of a checkpoint: on the Hub ``org/name`` or ``org/name:FILE``, else that of the
    directory or file, and no path of this machine."""
    cached = cached_name(path)
    if cached is None:
        return Path(path).resolve().name
    return cached.repo if cached.file is None else f"{cached.repo}:{cached.file}"
