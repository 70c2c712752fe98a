"""Reading and writing the files that users hand over and keep: whole or not at all, one-line errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from .errors import InputError

FilePath = str | os.PathLike[str]


def open_regular(path: FilePath) -> BinaryIO:
    """Open a file for reading bytes. A directory, FIFO or device is refused: it may block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(path, getattr(error, "strerror", None) or error) from None
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise InputError(path, "is a directory, expected a file" if stat.S_ISDIR(kind) else "is not a regular file")
    return os.fdopen(descriptor, "rb")


def open_stream(path: FilePath) -> BinaryIO:
    """As :func:`open_regular`, but a pipe, such as the ``<(...)`` of a shell, is accepted, too."""
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            return open(path, "rb")
    except (OSError, ValueError) as error:
        raise InputError(path, getattr(error, "strerror", None) or error) from None
    return open_regular(path)


def read_text(path: FilePath, *, limit: int = 1 << 30, may_stream: bool = False) -> str:
    """Return the file as UTF-8 text without a byte order mark; raise InputError naming it otherwise.

    Args:
        limit: the most bytes accepted.
        may_stream: accept a pipe too, such as the ``<(...)`` of a shell.
    """
    with open_stream(path) if may_stream else open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise InputError(path, error.strerror or error) from None
    if len(content) > limit:
        raise InputError(path, f"has more than the {limit} bytes accepted")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text (byte {error.start})") from None


def parse_json(text: str, where: FilePath) -> Any:
    """Parse strict JSON. ``where`` names the source.

    NaN, Infinity, numbers beyond a double, repeated keys, half surrogate pairs and absurd nesting are refused.
    """

    def refuse(name: str) -> NoReturn:
        raise InputError(where, f"holds {name}, which JSON does not have")

    def finite(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise InputError(where, f"holds {digits[:20]}, which is beyond a double")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for key, value in pairs:
            if key in record:
                raise InputError(where, f"repeats the key {key!r}")
            record[key] = value
        return record

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
        if "\\ud" in text.lower():  # half of a surrogate pair can only come from an escape
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        raise InputError(where, f"is not JSON: {error.msg} (line {error.lineno})") from None
    except RecursionError:
        raise InputError(where, "is nested too deeply") from None
    except UnicodeEncodeError:
        raise InputError(where, "holds half of a surrogate pair, which is not text") from None

    except InputError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(where, f"is not JSON: {error}") from None


def read_json(path: FilePath, *, limit: int = 256 << 20) -> Any:
    """Return the parsed JSON file; raise InputError naming it otherwise."""
    return parse_json(read_text(path, limit=limit), path)


def write_text(path: FilePath, text: str) -> None:
    """Write the file whole or not at all: a temporary file beside it, fsync, rename. Raise InputError naming it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: FilePath, content: bytes) -> None:
    """As :func:`write_text`, for bytes."""
    with replaced(path) as file:
        file.write(content)


@contextlib.contextmanager
def replaced(path: FilePath, *, keep: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` when the block ends well: a temporary file beside it, fsync, rename.

    With ``keep`` a file that already exists at ``path`` stays as it is.
    """
    target = _target(path)
    temporary = _beside(target)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, target)
        else:
            os.replace(temporary, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise InputError(path, f"cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    """Make a new file's name survive a loss of power, where the system lets a directory be opened and synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_directory(path: FilePath) -> None:
    """Make a directory unless it exists; its parent must exist. Raise InputError naming it."""
    try:
        Path(path).mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(path, f"cannot be made a directory: {getattr(error, 'strerror', None) or error}") from None


@contextlib.contextmanager
def parents_made(path: FilePath) -> Iterator[None]:
    """Make the directories that lead to ``path``. Those made here are removed if the block raises, as far as empty."""
    missing: list[Path] = []
    folder = Path(os.path.abspath(path)).parent
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    try:
        for each in reversed(missing):
            make_directory(each)
        yield
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory beside ``out``, which becomes ``out`` when the ``with`` ends, and goes if it ends in an error.

    Raises:
        InputError: it cannot be written, or an OSError came out of the ``with``; names ``out``.
    """
    partial = out.parent / f".{out.name}-{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
        try:
            yield partial
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(out, f"cannot be written: {error.strerror or error}") from None


def check_directory(path: FilePath) -> None:
    """As :func:`check_writable`, for a directory that will be made unless it exists, and for files in it."""
    name = os.fspath(path)
    if os.path.lexists(name) and not os.path.isdir(name):
        raise InputError(path, "is not a directory")
    check_writable(os.path.join(name, "a file") if os.path.isdir(name) else name.rstrip(os.sep))


def check_writable(path: FilePath) -> None:
    """Raise InputError now, before hours of work, where ``path`` could not be written at the end.

    A file of PROBE bytes is written beside it and removed: only this shows a full disk or one that takes no files.
    """
    target = _target(path)
    if not os.path.isdir(target.parent):
        raise InputError(path, f"cannot be written: no directory {str(target.parent)!r}")
    temporary = _beside(target)
    try:
        with open(temporary, "xb") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(path, f"cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


PROBE = 64 << 10  # bytes


def _beside(target: Path) -> Path:
    return target.parent / f".cna-{secrets.token_hex(8)}.tmp"


def _target(path: FilePath) -> Path:
    """Where writing to ``path`` ends up, symbolic links followed; only a regular file is ever replaced."""
    name = os.fspath(path)
    if name.endswith(os.sep) or os.path.isdir(name):
        raise InputError(path, "is a directory, cannot be written as a file")
    try:
        # Not of realpath: /dev/stdout leads to a name such as pipe:[123], where nothing is.
        found = os.stat(name)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:  # a loop of links; a file as a folder; a NUL in the name
        raise InputError(path, f"cannot be written: {getattr(error, 'strerror', None) or error}") from None
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise InputError(path, "cannot be written: is not a regular file")
    if found is not None and _is_output(found):
        raise InputError(path, "cannot be written: is where the output of this process goes")
    target = Path(os.path.realpath(name))
    if os.path.lexists(target) and not os.path.isfile(target):
        raise InputError(path, "cannot be written: is not a regular file")
    if len(os.fsencode(target.name)) > 255:
        raise InputError(path, "cannot be written: File name too long")
    return target


def _is_output(found: os.stat_result) -> bool:
    """Whether a file is the one that stdout or stderr goes to: to replace it would lose what is there."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(descriptor)):
                return True
    return False


class Digest:
    """SHA-256 of parts, each preceded by its length so that ("ab", "c") and ("a", "bc") differ."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, part: bytes | str) -> None:
        """Add a part; text as UTF-8."""
        part = part.encode("utf-8") if isinstance(part, str) else part
        self._digest.update(len(part).to_bytes(8, "little"))
        self._digest.update(part)

    def __str__(self) -> str:
        return self._digest.hexdigest()


def sha256(*parts: bytes | str) -> str:
    """The :class:`Digest` of the parts."""
    digest = Digest()
    for part in parts:
        digest.add(part)
    return str(digest)
