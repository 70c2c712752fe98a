"""The finished parts of an evaluation on disk: after a kill, the same command goes on from them.

manifest.json      what the results depend on; replaced only while no part exists
parts/NAME.json    one finished part and its hash: written once, as a whole file
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.files import make_directory, read_json, sha256, write_text

from ..discovery.run_directory import first_difference

try:
    import fcntl
except ImportError:  # Windows has no fcntl: there users must not start two runs in one directory
    fcntl = None  # type: ignore[assignment]

FORMAT = 3
PIECE = 64  # texts, windows or questions of one part


class Store:
    """The directory of one evaluation, held by one process at a time.

    Use as a context manager. Without a path nothing is kept.
    """

    def __init__(self, path, facts: dict):
        """
        Args:
            facts: what the results depend on: JSON values.

        Raises:
            InputError: the directory holds another evaluation; names the first field that differs.
        """
        self.path = None if path is None else Path(path)
        self.facts = json.loads(json.dumps({"format": FORMAT, **facts}))  # the values as read_json will give them
        self._lock: int | None = None

    def __enter__(self) -> Store:
        if self.path is None:
            return self
        make_directory(self.path)
        self._lock = _lock(self.path)
        try:
            manifest = self.path / "manifest.json"
            make_directory(self.path / "parts")
            if not os.path.lexists(manifest) or not any((self.path / "parts").glob("*.json")):
                write_text(manifest, json.dumps(self.facts, indent=1) + "\n")
            difference = first_difference(self.facts, read_json(manifest))
            if difference is not None:
                field, mine, theirs = difference
                raise InputError(
                    f"{manifest}: {field}", f"belongs to another evaluation: it has {theirs}, this one {mine}"
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def get(self, name: str, compute: Callable[[], object]):
        """Return the part ``name``, a JSON value, from disk. If it is not there, compute and write it first."""
        if self.path is None:
            return json.loads(json.dumps(compute()))
        path = self.path / "parts" / f"{name}.json"
        if not path.exists():
            value = json.loads(json.dumps(compute(), allow_nan=False))  # as it will be read again
            record = {"sha256": _hash(value), "value": value}
            write_text(path, json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        record = read_json(path)  # read, so that a run that goes on after a kill gets the same value
        if not isinstance(record, dict) or record.get("sha256") != _hash(record.get("value")):
            what = "is damaged: it does not have the hash that it was written with"
            raise InputError(path, f"{what}; delete it, and the same command computes it again")
        return record["value"]


def in_pieces(
    store: Store,
    name: str,
    variants: Sequence[int],
    items: Sequence,
    work: Callable[[Sequence, Sequence[int]], Mapping[int, list]],
    say: Callable[[str], None] = lambda text: None,
) -> list[list]:
    """Work through items in pieces, each of which is a part in the store. Returns one list for each variant.

    Args:
        name: begins the names of the parts.
        work: ``work(piece, variants)`` gives {variant: list} for a piece of at most PIECE items.
    """
    found: list[list] = [[] for _ in variants]

    def of_all(piece: Sequence) -> list:
        return [*work(piece, variants).values()]

    for start in range(0, len(items), PIECE):
        say(f"{name}: {start} of {len(items)}")
        done = store.get(f"{name}-{start // PIECE:05d}", partial(of_all, items[start : start + PIECE]))
        for mine, more in zip(found, done, strict=True):
            mine += more
    return found


def _hash(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True))


def _lock(path) -> int | None:
    """Lock the directory for this process. The system drops the lock when the process ends, however it ends."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(path / ".lock", f"cannot be written: {error.strerror or error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise InputError(path, "another evaluation is writing here") from None
    return descriptor
