"""A run directory: a run that survives. Its processes may be killed at any time, and the same command goes on.

    manifest.json             what the sums depend on: model, prompts, plan of units, versions. Written once
    prompts-HASH.jsonl        the corpus
    parts/000017.safetensors  what unit 17 adds: written whole, once, never changed; see parts.py

Nothing says who works on a unit: a unit that two processes run gives the same part, and the first to arrive is kept. So
no lock has to hold, and nothing has to be cleaned up after a crash. This module loads no torch, so that `cna status`
answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.fields import REQUIRED, Fields, is_whole, short
from cna_kernels.files import make_directory, read_json, replaced, sha256

from ..prompts.corpus import Corpus, Unit
from .part_header import read_header

FORMAT = 1
PATIENCE, POLL = 60.0, 0.2  # seconds: until a network file system shows what another machine wrote; between looks
ABANDONED = 60.0  # seconds after which a part that is half written was its writer's last
_MOST = 1 << 62  # prompts or bytes of a run
RECENT = 16  # parts that the rate in the status is taken from


class RunDirectory:
    """One run on disk. ``manifest`` is what it was started with."""

    def __init__(self, path, manifest: dict):
        self.path, self.manifest = Path(path), manifest
        _check_manifest(manifest, self.path / "manifest.json")
        self.fingerprint = sha256(json.dumps(manifest, sort_keys=True))
        self.units = [Unit(*unit) for unit in manifest["corpus"]["units"]]

    @classmethod
    def open(cls, path, patience: float = 0.0) -> RunDirectory:
        """Open a run that has been started. Raises InputError naming the directory or the field.

        Args:
            patience: seconds in which the manifest of another machine may still come into sight.
        """
        where, deadline = Path(path) / "manifest.json", time.monotonic() + patience
        while not os.path.lexists(where) and time.monotonic() < deadline:
            time.sleep(POLL)
        if not os.path.lexists(where):
            raise InputError(path, "is no run directory: it has no manifest.json")
        return cls(path, read_json(where))

    @classmethod
    def start(cls, path, facts: dict, corpus: Corpus) -> RunDirectory:
        """Start a run, or join the one that is there.

        Args:
            facts: what the sums depend on besides the prompts: JSON values.

        Raises:
            InputError: the directory holds another run; names the first field that differs.
        """
        path = Path(path)
        prompts = cls.prepare(path, corpus)
        manifest = {"format": FORMAT, **facts, "corpus": corpus.record() | {"file": prompts.name}}
        manifest = json.loads(json.dumps(manifest))  # as it will be read again
        if not os.path.lexists(path / "manifest.json"):
            write_once(path / "manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
        run = cls.open(path)
        _refuse_another(path, manifest, run.manifest)
        for left in (path / "parts").glob(".cna-*.tmp"):  # by writers that were killed
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()
        return run

    @classmethod
    def prepare(cls, path, corpus: Corpus) -> Path:
        """Make the directory of a run that is about to start, and return the file of its prompts there.

        Raises:
            InputError: the directory holds a run of other prompts.
        """
        path = Path(path)
        prompts = path / f"prompts-{corpus.sha256[:16]}.jsonl"
        for directory in (path, path / "parts"):
            make_directory(directory)
        if os.path.lexists(path / "manifest.json"):
            record = json.loads(json.dumps(corpus.record() | {"file": prompts.name}))
            _refuse_another(path, {"corpus": record}, {"corpus": cls.open(path).manifest["corpus"]})
        else:
            corpus.copy_to(prompts)
        return prompts

    def corpus(self) -> Corpus:
        """The prompts of the run."""
        return Corpus.open(self.path / self.manifest["corpus"]["file"], self.manifest["corpus"])

    def part_path(self, unit: int) -> Path:
        return self.path / "parts" / f"{unit:06d}.safetensors"

    def is_done(self, unit: int) -> bool:
        return self.part_path(unit).exists()

    def missing(self) -> list[int]:
        """Units without a part."""
        present = set(_names(self.path / "parts"))
        return [unit for unit in range(len(self.units)) if self.part_path(unit).name not in present]

    def check_names(self):
        """Refuse files among the parts that are none."""
        known = {self.part_path(unit).name for unit in range(len(self.units))}
        for name in sorted(_names(self.path / "parts")):
            if name not in known:
                raise InputError(self.path / "parts" / name, "is no part of this run")

    def status(self) -> dict:
        """What is done, how large it is, when the last part came, and how fast the last ones did.

        The rate is that of the last RECENT parts, from the times of their files; None where there are fewer than two.
        Damaged parts are not done; of each "damaged" says why. What a part's header does not show is found when the
        parts are merged.
        """
        missing, damaged = set(self.missing()), []
        self.check_names()
        for unit in range(len(self.units)):
            if unit not in missing:
                try:
                    read_header(self, unit)
                except InputError as error:
                    damaged.append(str(error))
                    missing.add(unit)
        done = [unit for unit in range(len(self.units)) if unit not in missing]
        files = [self.part_path(unit).stat() for unit in done]
        came = sorted((file.st_mtime, self.units[unit].n_prompts) for file, unit in zip(files, done, strict=True))
        latest = came[-RECENT:]
        seconds = latest[-1][0] - latest[0][0] if latest else 0.0
        rate = sum(n_prompts for _, n_prompts in latest[1:]) / seconds if seconds else None
        left = sum(self.units[unit].n_prompts for unit in missing)
        return {
            "model": self.manifest["model"]["name"],
            "units": len(self.units),
            "units_done": len(done),
            "damaged": damaged,
            "prompts": sum(unit.n_prompts for unit in self.units),
            "prompts_done": sum(self.units[unit].n_prompts for unit in done),
            "part_bytes": sum(file.st_size for file in files),
            "last_part_s": round(max(time.time() - came[-1][0], 0.0), 1) if came else None,
            "prompts_per_s": round(rate, 2) if rate else None,
            "eta_s": round(left / rate, 1) if rate else None,
        }


def _refuse_another(path: Path, mine: dict, theirs: dict):
    difference = first_difference(mine, theirs)
    if difference is not None:
        field, mine_has, theirs_has = difference
        what = f"belongs to another run: it has {theirs_has}, this one {mine_has}"
        raise InputError(f"{path / 'manifest.json'}: {field}", what)


def _names(directory: Path) -> list[str]:
    """What a directory holds, without files that are being written."""
    try:
        return [entry.name for entry in os.scandir(directory) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(directory, f"cannot be read: {error.strerror}") from None


def _check_manifest(manifest: object, where: Path):
    """Raise InputError naming the first field that is not what this class and :class:`Corpus` read."""
    fields = Fields(manifest, where)
    fields.read("format", REQUIRED, str(FORMAT), lambda x: x == FORMAT)
    fields.object("model").text("name")
    fields.integer("threads", (1, _MOST), None)
    fields.items("shape", lambda x: is_whole(x) and 0 < x <= _MOST, "layers and neurons", None)
    fields.items("squares", lambda x: isinstance(x, bool), "true or false", None)
    corpus = fields.object("corpus")
    corpus.text("sha256")
    corpus.integer("n_prompts", (0, _MOST))
    corpus.items("columns", lambda x: isinstance(x, str), "names")
    corpus.read("file", REQUIRED, "a file beside the manifest", lambda x: isinstance(x, str) and Path(x).name == x)
    corpus.items("units", _is_unit, "[first, number of prompts, offset, sha256]")
    for name in (count := corpus.object("count")).record:
        count.integer(name, (0, _MOST))
    for name in (weight := corpus.object("weight")).record:
        weight.number(name, (0, 1e300))
    for name in (digests := corpus.object("digests")).record:
        digests.text(name)


def _is_unit(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(Unit._fields)
        and all(is_whole(number) and 0 <= number <= _MOST for number in value[:-1])
        and isinstance(value[-1], str)
    )


def write_once(path: Path, content: bytes):
    """Write a file whole or not at all, unless it is there already."""
    with replaced(path, keep=True) as file:
        file.write(content)


def first_difference(mine, theirs, field="") -> tuple[str, object, object] | None:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            found = first_difference(mine.get(name), theirs.get(name), f"{field}.{name}" if field else name)
            if found:
                return found
        return None
    return None if mine == theirs else (field, short(mine), short(theirs))
