"""Reading and writing the files that users hand over and keep: whole or not at all, one-line errors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from pathlib import Path

from .checks import InputError


def read_text(path, *, limit: int = 1 << 30) -> str:
    """Return the file as UTF-8 text without a byte order mark; raise InputError naming it otherwise."""
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(path, "is a directory, expected a file")
        size = path.stat().st_size
        if size > limit:
            raise InputError(path, f"has {size} bytes, more than the {limit} accepted")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(path, error.strerror or str(error)) from None


def parse_json(text: str, where):
    """Parse strict JSON: NaN, Infinity, repeated keys and absurd nesting are refused. ``where`` names the source."""

    def refuse(name):
        raise InputError(where, f"holds {name}, which JSON does not have")

    def finite(digits):
        value = float(digits)
        if math.isinf(value):
            raise InputError(where, f"holds {digits[:20]}, which is beyond a double")
        return value

    def unique(pairs):
        record = dict(pairs)
        if len(record) != len(pairs):
            names = [key for key, _ in pairs]
            raise InputError(where, f"repeats the key {next(n for n in names if names.count(n) > 1)!r}")
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


def read_json(path, *, limit: int = 256 << 20):
    """Return the parsed JSON file; raise InputError naming it otherwise."""
    return parse_json(read_text(path, limit=limit), path)


def write_text(path, text: str):
    """Write the file whole or not at all: a temporary file beside it, fsync, rename. Raise InputError naming it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path, content: bytes):
    """As :func:`write_text`, for bytes."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(path, f"cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path):
    """Raise InputError now, before hours of work, where ``path`` could not be written at the end."""
    path = Path(path)
    if path.is_dir():
        raise InputError(path, "is a directory, cannot be written as a file")
    if not path.parent.is_dir():
        raise InputError(path, f"cannot be written: no directory {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(path, "cannot be written: Permission denied")


def sha256(*parts: bytes | str) -> str:
    """Hash the parts, each preceded by its length so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
