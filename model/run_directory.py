"""A run directory: a run that survives. Any number of processes work on it, and any of them may be killed.

    manifest.json             what the sums depend on: model, prompts, plan of units, versions. Written once
    prompts-HASH.jsonl        the corpus
    parts/000017.safetensors  what unit 17 adds: written whole, once, never changed
    claims/000017             who works on unit 17; touched while it does

Claims only save work: a unit that two workers run gives the same part, and the first to arrive is kept. So no lock
has to hold, and nothing has to be cleaned up after a crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cna_kernels.checks import InputError
from cna_kernels.files import Digest, make_directory, read_json, replaced, sha256

from .attribute import Part, SlotSums
from .corpus import Corpus, Unit

FORMAT = 1
HEARTBEAT, STALE = 5.0, 60.0  # seconds between two touches of a claim, and after which silence another takes the unit
PATIENCE = 900.0  # seconds without a finished forward pass after which a worker no longer touches its claims
POLL = 0.2


class RunDirectory:
    """One run on disk. ``manifest`` is what it was started with."""

    def __init__(self, path, manifest: dict):
        self.path, self.manifest = Path(path), manifest
        self.fingerprint = sha256(json.dumps(manifest, sort_keys=True))
        self.units = [Unit(*unit) for unit in manifest["corpus"]["units"]]

    @classmethod
    def open(cls, path) -> RunDirectory:
        """Open a run that has been started. Raises InputError naming the directory or the field."""
        where = Path(path) / "manifest.json"
        if not os.path.lexists(where):
            raise InputError(path, "is no run directory: it has no manifest.json")
        manifest = read_json(where)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else manifest
            raise InputError(f"{where}: format", f"expected {FORMAT}, got {found!r}")
        try:
            return cls(path, manifest)
        except (KeyError, TypeError):
            raise InputError(where, "is not the manifest of a run") from None

    @classmethod
    def wait(cls, path) -> RunDirectory:
        """Open a run as soon as another worker has started it."""
        while not os.path.lexists(Path(path) / "manifest.json"):
            time.sleep(POLL)
        return cls.open(path)

    @classmethod
    def start(cls, path, facts: dict, corpus: Corpus) -> RunDirectory:
        """Start a run, or join the one that is there.

        Args:
            facts: what the sums depend on besides the prompts: JSON values.

        Raises:
            InputError: the directory holds another run; names the first field that differs.
        """
        path = Path(path)
        name = f"prompts-{corpus.sha256[:16]}.jsonl"
        manifest = {"format": FORMAT, **facts, "corpus": corpus.record() | {"file": name}}
        manifest = json.loads(json.dumps(manifest))  # as it will be read again
        for directory in (path, path / "parts", path / "claims"):
            make_directory(directory)
        if not os.path.lexists(path / "manifest.json"):
            corpus.copy_to(path / name)
            _write_once(path / "manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
        run = cls.open(path)
        difference = _first_difference(manifest, run.manifest)
        if difference is not None:
            field, mine, theirs = difference
            raise InputError(
                f"{path / 'manifest.json'}: {field}", f"belongs to another run: it has {theirs}, this one {mine}"
            )
        return run

    def corpus(self) -> Corpus:
        """The prompts of the run."""
        return Corpus.open(self.path / self.manifest["corpus"]["file"], self.manifest["corpus"])

    def part_path(self, unit: int) -> Path:
        return self.path / "parts" / f"{unit:06d}.safetensors"

    def is_done(self, unit: int) -> bool:
        return self.part_path(unit).exists()

    def missing(self) -> list[int]:
        """Units without a part."""
        present = {entry.name for entry in os.scandir(self.path / "parts")}
        return [unit for unit in range(len(self.units)) if f"{unit:06d}.safetensors" not in present]

    def write_part(self, unit: int, part: Part):
        """Write what a unit adds, whole or not at all. A part that is there already stays."""
        tensors, counts = {}, {}
        for number, slot in part.slots.items():
            tensors[f"total.{number}"], counts[str(number)] = slot.total, slot.count
            if slot.total_sq is not None:
                tensors[f"total_sq.{number}"] = slot.total_sq
        if part.universal is not None:
            tensors["universal"] = part.universal
        facts = {
            "unit": unit,
            "fingerprint": self.fingerprint,
            "counts": counts,
            "n_universal": part.n_universal,
            "n_prompts": part.n_prompts,
            "n_tokens": part.n_tokens,
            "skipped": part.skipped,
        }
        # One entry of metadata: safetensors writes several in any order, and a part has the same bytes every time.
        record = json.dumps({"facts": facts, "sha256": _hash(facts, tensors)}, sort_keys=True)
        _write_once(self.part_path(unit), save(tensors, metadata={"part": record}))

    def read_part(self, unit: int, *, where: Path | None = None) -> Part:
        """Read and check the part of a unit. Raises InputError naming the file for one that is torn or foreign."""
        path = where or self.part_path(unit)
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                record = json.loads((file.metadata() or {})["part"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts, expected = record["facts"], record["sha256"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(path, f"is no part of a run: {error}") from None
        if _hash(facts, tensors) != expected:
            raise InputError(path, "is damaged: its contents do not have the hash that it was written with")
        if facts["fingerprint"] != self.fingerprint:
            raise InputError(path, f"belongs to another run than {self.path / 'manifest.json'}")
        if facts["unit"] != unit:
            raise InputError(path, f"holds unit {facts['unit']}, its name says {unit}")
        part = Part(
            universal=tensors.get("universal"),
            n_universal=facts["n_universal"],
            n_prompts=facts["n_prompts"],
            n_tokens=facts["n_tokens"],
            skipped=facts["skipped"],
        )
        for number, count in facts["counts"].items():
            squares = tensors.get(f"total_sq.{number}")
            part.slots[int(number)] = SlotSums(tensors[f"total.{number}"], squares, count)
        return part

    def merged(self) -> Part:
        """Add all parts, in the order of their units. Raises InputError if one is missing, damaged or foreign."""
        missing = self.missing()
        if missing:
            raise InputError(self.path, f"{len(missing)} of {len(self.units)} units are not done")
        known = {f"{unit:06d}.safetensors" for unit in range(len(self.units))}
        strange = sorted(
            entry.name
            for entry in os.scandir(self.path / "parts")
            if entry.name not in known and not entry.name.startswith(".cna-")  # left by a killed worker
        )
        if strange:
            raise InputError(self.path / "parts" / strange[0], "is no part of this run")
        total = Part()
        for unit in range(len(self.units)):
            total += self.read_part(unit)
        return total

    def status(self) -> dict:
        """What is done, and who works on what."""
        missing = set(self.missing())
        done = [unit for unit in range(len(self.units)) if unit not in missing]
        workers = []
        now = time.time()
        for entry in sorted(os.scandir(self.path / "claims"), key=lambda entry: entry.name):
            with contextlib.suppress(OSError, ValueError, KeyError):
                unit = int(entry.name)
                owner = json.loads(Path(entry.path).read_text())
                silent = now - entry.stat().st_mtime
                state = "dead" if _is_dead(owner) or silent > STALE else "working"
                if unit in missing:
                    workers.append(
                        {"unit": unit, "host": owner["host"], "pid": owner["pid"], "silent_s": round(silent, 1)}
                        | {"state": state}
                    )
        return {
            "model": self.manifest["model"]["name"],
            "units": len(self.units),
            "units_done": len(done),
            "prompts": sum(unit.n_prompts for unit in self.units),
            "prompts_done": sum(self.units[unit].n_prompts for unit in done),
            "part_bytes": sum(entry.stat().st_size for entry in os.scandir(self.path / "parts")),
            "workers": workers,
        }


class Worker:
    """Claims units of a run, one after the other, and keeps the claims alive while it works."""

    def __init__(self, run: RunDirectory, *, first: int = 0):
        """``first`` is where the search for work starts; workers that start apart rarely meet."""
        self.run, self._first = run, first
        self._owner = _this_process()
        self._held: set[int] = set()
        self._progress = time.monotonic()
        self._stop = threading.Event()

    def __enter__(self) -> Worker:
        self._beat = threading.Thread(target=self._keep_alive, name="claims", daemon=True)
        self._beat.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._beat.join()
        for unit in list(self._held):
            self.release(unit)
        with contextlib.suppress(OSError):
            self._clock_path().unlink()

    def progressed(self):
        """Say that a forward pass has finished: a worker that hangs says so no more, and loses its claims."""
        self._progress = time.monotonic()

    def units(self) -> Iterator[int]:
        """Yield units to run until none is left that nobody works on."""
        while (unit := self._claim()) is not None:
            yield unit

    def finish(self, unit: int, part: Part):
        """Write the part of a unit and give its claim back."""
        self.run.write_part(unit, part)
        self.release(unit)

    def wait(self) -> bool:
        """Wait until all units are done (True), or until one is to be had again, whose worker has died (False)."""
        while missing := self.run.missing():
            if any(self._claim_state(unit) != "held" for unit in missing):
                return False
            time.sleep(POLL)
        return True

    def release(self, unit: int):
        self._held.discard(unit)
        with contextlib.suppress(OSError):
            self._claim_path(unit).unlink()

    def _claim(self) -> int | None:
        missing = self.run.missing()
        later = [unit for unit in missing if unit >= self._first]
        for unit in [*later, *(unit for unit in missing if unit < self._first)]:
            if unit not in self._held and self._take(unit):
                return unit
        return None

    def _take(self, unit) -> bool:
        """Create the claim. A dead one is removed first; if two workers do that at once, both run the unit at worst."""
        path = self._claim_path(unit)
        state = self._claim_state(unit)
        if state == "held":
            return False
        if state == "dead":
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        try:
            with open(path, "x") as file:
                json.dump(self._owner, file)
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError(path, f"cannot be written: {error.strerror}") from None
        if self.run.is_done(unit):  # its worker has finished it meanwhile
            self.release(unit)
            return False
        self._held.add(unit)
        return True

    def _claim_state(self, unit) -> str:
        """Whether a unit is "free", "held" by a worker, or claimed by a "dead" one."""
        path = self._claim_path(unit)
        try:
            silent = self._now() - path.stat().st_mtime
            owner = json.loads(path.read_text())
        except FileNotFoundError:
            return "free"
        except ValueError:  # just created, or its worker died while it wrote
            owner = {}
        return "dead" if silent > STALE or _is_dead(owner) else "held"

    def _keep_alive(self):
        while not self._stop.wait(HEARTBEAT):
            if time.monotonic() - self._progress < PATIENCE:
                for unit in list(self._held):
                    with contextlib.suppress(OSError):
                        os.utime(self._claim_path(unit))

    def _now(self) -> float:
        """The time of the file system that holds the claims, which may be another machine's."""
        path = self._clock_path()
        path.touch()
        return path.stat().st_mtime

    def _clock_path(self) -> Path:
        return self.run.path / "claims" / f".clock-{self._owner['host']}-{self._owner['pid']}"

    def _claim_path(self, unit) -> Path:
        return self.run.path / "claims" / f"{unit:06d}"


def _this_process() -> dict:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _is_dead(owner) -> bool:
    """Whether the process is known to be gone; of another host's processes nothing is known."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    started = _started(owner["pid"])
    return started is None or started != owner.get("started", started)


def _started(pid: int) -> str | None:
    """When a process of this host was started, so that another with its number is not taken for it; None if it ended.

    Where /proc does not tell, "running".
    """
    if sys.platform == "linux":
        try:
            # after the name, which may hold anything: the state, 18 other fields, the start in clock ticks since boot
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return None if fields[0] in "ZX" else fields[19]
        except OSError:
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "running"


def _write_once(path: Path, content: bytes):
    """Write a file whole or not at all, unless it is there already."""
    with replaced(path, keep=True) as file:
        file.write(content)


def _hash(facts: dict, tensors: dict[str, torch.Tensor]) -> str:
    digest = Digest()
    digest.add(json.dumps(facts, sort_keys=True))
    for name in sorted(tensors):
        digest.add(name)
        digest.add(tensors[name].contiguous().numpy().tobytes())
    return str(digest)


def _first_difference(mine, theirs, field="") -> tuple[str, object, object] | None:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            found = _first_difference(mine.get(name), theirs.get(name), f"{field}.{name}" if field else name)
            if found:
                return found
        return None
    return None if mine == theirs else (field, _short(mine), _short(theirs))


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
