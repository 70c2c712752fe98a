"""What tells a checkpoint from others: hashes of every weight, and of every field of config.json, that the model reads.

Every file is read once: the hashes of its tensors are kept in the user's cache, by the file's device, inode, size and
times. A cache that is damaged or cannot be written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cna_kernels.errors import InputError, one_line
from cna_kernels.files import read_json, sha256, write_text
from cna_kernels.fingerprint import Marks, decoder_sha256, in_threads

from ..hub.names import cached_name, checkpoint_name
from .config import ModelConfig
from .load import expected_shapes
from .safetensors_file import Checkpoint, TensorEntry

FORMAT = 2
PIECE = 4 << 20  # bytes read at a time
FRESH = 3.0  # seconds: a file changed as lately as this may change again without another time
_BASE = "model."  # in front of the names of the decoder's weights
_LARGEST = 64 << 20  # bytes of a file in the cache

Hashes = tuple[str, str]  # of a tensor's bytes, and of its marks


def identity_of(directory, checkpoint: Checkpoint, config: ModelConfig) -> dict[str, str]:
    """What identifies a checkpoint: its name and three hashes; in the Hub's cache also ``repo`` and the commit,
    ``revision``, which only inform.

    - ``settings_sha256``: of the fields of config.json that are read. Other fields, and spellings, do not count.
    - ``tensors_sha256``: of dtype, shape and every byte of the weights that the model reads, by their names. How they
      are divided into files does not count.
    - ``decoder_sha256``: of the same weights but ``lm_head``, rounded to bf16: a model in memory has the same.

    The tokenizer and the chat template have hashes of their own; generation_config.json does not count.
    """
    used = {name: checkpoint.entries[name] for name in expected_shapes(config) if name in checkpoint.entries}
    by_file_name = hashes_of(list({entry.name: entry for entry in used.values()}.values()))
    parts: list[str] = []
    for name, entry in sorted(used.items()):
        parts += [name, entry.kind, repr(list(entry.shape)), by_file_name[entry.name][0]]
    decoder = {
        name.removeprefix(_BASE): by_file_name[entry.name][1] for name, entry in used.items() if name.startswith(_BASE)
    }
    return {
        **named(directory),
        "settings_sha256": settings_sha256(config),
        "tensors_sha256": sha256(*parts),
        "decoder_sha256": decoder_sha256(decoder),
    }


def named(directory) -> dict[str, str]:
    """The name of a checkpoint; in the Hub's cache also its repository and commit."""
    cached = cached_name(directory)
    found = {"name": one_line(checkpoint_name(directory))}  # a name may be no text
    return found if cached is None else {**found, "repo": cached.repo, "revision": str(cached.revision)}


class Identity:
    """The identity of a checkpoint that was opened just now: a call computes it, once.

    Raises:
        InputError: the call finds that a file has been replaced or written to since.
    """

    def __init__(self, checkpoint: Checkpoint, identify: Callable[[], dict[str, str]]):
        self._checkpoint, self._identify = checkpoint, identify
        self._stamps = self._now()
        self._known: dict[str, str] | None = None

    def __call__(self) -> dict[str, str]:
        if self._known is None:
            for path, stamp in self._now().items():
                if stamp != self._stamps[path]:
                    raise InputError(path, "was changed after it was loaded")
            self._known = self._identify()
        return dict(self._known)

    def _now(self) -> dict[Path, dict[str, int]]:
        stamps = {path: _stamp(path) for path in {entry.path for entry in self._checkpoint.entries.values()}}
        return {path: {**stamp, "ctime_ns": 0} for path, stamp in stamps.items()}  # new links and rights do not count


def settings_sha256(config: ModelConfig) -> str:
    """The hash of all that config.json says of the model, however it says it.

    A field at its class's default does not count, so that a field which is new here changes no other model's hash.
    """
    return sha256(json.dumps(_settings(config), sort_keys=True))


def _settings(record: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = _settings(value)
        elif value != field.default:
            found[field.name] = value
    return found


def hashes_of(entries: Sequence[TensorEntry]) -> dict[str, Hashes]:
    """The hashes of every entry by name, from the cache or from the file.

    Raises:
        InputError: a file cannot be read, or changes meanwhile.
    """
    files: dict[Path, list[TensorEntry]] = {}
    for entry in entries:
        files.setdefault(entry.path, []).append(entry)
    known: dict[str, Hashes] = {}
    for path, inside in files.items():
        now, stamp = time.time(), _stamp(path)
        found = _recall(stamp)
        unknown = [entry for entry in inside if entry.name not in found]
        if unknown:
            found |= dict(zip((entry.name for entry in unknown), in_threads(_hash, unknown), strict=True))
            if _stamp(path) != stamp:
                raise InputError(path, "was changed while it was read")
            if now - max(stamp["mtime_ns"], stamp["ctime_ns"]) / 1e9 > FRESH:
                _remember(stamp, found)
        known |= {entry.name: found[entry.name] for entry in inside}
    return known


def _hash(entry: TensorEntry) -> Hashes:
    whole, marks = hashlib.sha256(), Marks()
    for content, rows in entry.pieces(PIECE):
        whole.update(content)
        if entry.dtype is not None:
            marks.add(rows)
    return whole.hexdigest(), marks.sha256(entry.shape)


# The cache: a file for each checkpoint file, named by device and inode: what is known of a changed file is replaced.


def _stamp(path: Path) -> dict[str, int]:
    """What changes when the file does. Nobody can set ``ctime`` back."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(path, error.strerror or error) from None
    return {name: getattr(found, f"st_{name}") for name in ("dev", "ino", "size", "mtime_ns", "ctime_ns")}


def cache_directory() -> Path | None:
    """``cna-kernels`` in ``XDG_CACHE_HOME`` or ``~/.cache``; None where there is neither."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the standard says that relative paths count for nothing
        return Path(given, "cna-kernels")
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "cna-kernels"
    return None


def _cache_file(stamp: dict[str, int]) -> Path | None:
    directory = cache_directory()
    return None if directory is None else directory / f"hashes-{stamp['dev']:x}-{stamp['ino']:x}.json"


def _recall(stamp: dict[str, int]) -> dict[str, Hashes]:
    """The hashes that were remembered of this very file; nothing where the cache is damaged or of another file."""
    path = _cache_file(stamp)
    try:
        if path is None or not path.exists():
            return {}
        record = read_json(path, limit=_LARGEST)
        body = {"format": FORMAT, "stamp": stamp, "tensors": record["tensors"]}
        if record != body | {"sha256": _body_sha256(body)}:
            return {}
        return {name: (whole, marks) for name, (whole, marks) in body["tensors"].items()}
    except (InputError, OSError, TypeError, KeyError, ValueError, AttributeError):
        return {}


def _remember(stamp: dict[str, int], found: dict[str, Hashes]) -> None:
    path = _cache_file(stamp)
    if path is None:
        return
    body = {"format": FORMAT, "stamp": stamp, "tensors": {name: list(pair) for name, pair in sorted(found.items())}}
    with contextlib.suppress(InputError, OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps(body | {"sha256": _body_sha256(body)}) + "\n")


def _body_sha256(body: dict[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True))
