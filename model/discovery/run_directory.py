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
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cna_kernels.checks import InputError
from cna_kernels.files import Digest, make_directory, read_json, replaced, sha256

from ..prompts.corpus import Corpus, Unit
from .units import Part, SlotSums

FORMAT = 1
HEARTBEAT, STALE = 5.0, 60.0  # seconds between two touches of a claim, and after which silence another takes the unit
PATIENCE = 900.0  # seconds without a finished forward pass after which a worker no longer touches its claims
POLL = 0.2
TAIL = 16  # units that are left when a worker no longer takes one ahead


class RunDirectory:
    """One run on disk. ``manifest`` is what it was started with."""

    def __init__(self, path, manifest: dict):
        self.path, self.manifest = Path(path), manifest
        _check_manifest(manifest, self.path / "manifest.json")
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
        return cls(path, manifest)

    @classmethod
    def wait(cls, path) -> RunDirectory:
        """Open a run as soon as another worker has started it."""
        while not os.path.lexists(Path(path) / "manifest.json"):
            time.sleep(POLL)
        return cls.open(path)

    @classmethod
    def start(cls, path, facts: dict, corpus: Corpus, *, adopt: tuple[str, ...] = ()) -> RunDirectory:
        """Start a run, or join the one that is there.

        Args:
            facts: what the sums depend on besides the prompts: JSON values.
            adopt: those of them that a run which is there decides.

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
        manifest |= {name: run.manifest.get(name) for name in adopt}
        difference = first_difference(manifest, run.manifest)
        if difference is not None:
            field, mine, theirs = difference
            raise InputError(
                f"{path / 'manifest.json'}: {field}", f"belongs to another run: it has {theirs}, this one {mine}"
            )
        run._check_parts()
        for left in (path / "parts").glob(".cna-*.tmp"):  # by writers that were killed
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()
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
        present = set(_names(self.path / "parts"))
        return [unit for unit in range(len(self.units)) if self.part_path(unit).name not in present]

    def _check_parts(self):
        """Refuse damaged and foreign parts before any work; their contents are checked when they are merged."""
        missing = set(self.missing())
        self._check_names()
        for unit in range(len(self.units)):
            if unit not in missing:
                self._read(unit, tensors=False)

    def _check_names(self):
        known = {self.part_path(unit).name for unit in range(len(self.units))}
        for name in sorted(_names(self.path / "parts")):
            if name not in known:
                raise InputError(self.path / "parts" / name, "is no part of this run")

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
            "n_skipped": part.n_skipped,
            "skipped": part.skipped,
            "n_left_out": {str(column): count for column, count in part.n_left_out.items()},
        }
        # One entry of metadata: safetensors writes several in any order, and a part has the same bytes every time.
        record = json.dumps({"facts": facts, "sha256": _hash(facts, tensors)}, sort_keys=True)
        _write_once(self.part_path(unit), save(tensors, metadata={"part": record}))

    def read_part(self, unit: int) -> Part:
        """Read and check the part of a unit. Raises InputError naming the file for one that is torn or foreign."""
        facts, tensors = self._read(unit)
        part = Part(
            universal=tensors.get("universal"),
            n_universal=facts["n_universal"],
            n_prompts=facts["n_prompts"],
            n_tokens=facts["n_tokens"],
            n_skipped=facts["n_skipped"],
            skipped=facts["skipped"],
            n_left_out={int(column): count for column, count in facts["n_left_out"].items()},
        )
        for number, count in facts["counts"].items():
            squares = tensors.get(f"total_sq.{number}")
            part.slots[int(number)] = SlotSums(tensors[f"total.{number}"], squares, count)
        return part

    def _read(self, unit, *, tensors=True) -> tuple[dict, dict]:
        """The facts and tensors of a part; without ``tensors`` only the facts are read and checked."""
        path, found = self.part_path(unit), {}
        again = "; delete it, and the same command runs its unit again"
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                record = json.loads((file.metadata() or {})["part"])
                if tensors:
                    found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts, expected = record["facts"], record["sha256"]
            fingerprint, number = facts["fingerprint"], facts["unit"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(path, f"is no part of a run: {error}{again}") from None
        if fingerprint != self.fingerprint:
            raise InputError(path, f"belongs to another run than {self.path / 'manifest.json'}{again}")
        if number != unit:
            raise InputError(path, f"holds unit {number}, its name says {unit}{again}")
        if tensors and _hash(facts, found) != expected:
            raise InputError(path, f"is damaged: its contents do not have the hash that it was written with{again}")
        return facts, found

    def merged(self) -> Part:
        """Add all parts, in the order of their units. Raises InputError if one is missing, damaged or foreign."""
        missing = self.missing()
        if missing:
            raise InputError(self.path, f"{len(missing)} of {len(self.units)} units are not done")
        self._check_names()
        total = Part()
        for unit in range(len(self.units)):
            total += self.read_part(unit)
        return total

    def status(self) -> dict:
        """What is done, and who works on what."""
        missing = set(self.missing())
        done = [unit for unit in range(len(self.units)) if unit not in missing]
        workers, now = [], time.time()
        for name in sorted(_names(self.path / "claims")):
            path = self.path / "claims" / name
            with contextlib.suppress(OSError, ValueError):
                owner, silent = _owner(path), now - path.stat().st_mtime
                if int(name) in missing:
                    state = "dead" if _is_dead(owner) or silent > STALE else "working"
                    facts = {"unit": int(name), "host": owner.get("host"), "pid": owner.get("pid")}
                    workers.append(facts | {"silent_s": round(silent, 1), "state": state})
        return {
            "model": self.manifest["model"]["name"],
            "units": len(self.units),
            "units_done": len(done),
            "prompts": sum(unit.n_prompts for unit in self.units),
            "prompts_done": sum(self.units[unit].n_prompts for unit in done),
            "part_bytes": sum((self.path / "parts" / name).stat().st_size for name in _names(self.path / "parts")),
            "workers": workers,
        }


class Worker:
    """Claims units of a run, one after the other, and keeps the claims alive while it works."""

    def __init__(self, run: RunDirectory, *, first: int = 0):
        """``first`` is where the search for work starts; workers that start apart rarely meet."""
        self.run, self._first = run, first
        self._owner = _this_process()
        self._held: set[int] = set()
        self._candidates: deque[int] = deque()
        self._progress = time.monotonic()
        self._stop, self._released = threading.Event(), threading.Event()

    def __enter__(self) -> Worker:
        self._beat = threading.Thread(target=self._keep_alive, name="claims", daemon=True)
        self._beat.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._released.set()
        self._beat.join()
        for unit in list(self._held):
            self.release(unit)
        with contextlib.suppress(OSError):
            self._clock_path().unlink()

    def progressed(self):
        """Say that a forward pass has finished: a worker that hangs says so no more, and loses its claims."""
        self._progress = time.monotonic()

    def units(self) -> Iterator[int]:
        """Yield units to run until none is left that nobody works on.

        They are asked for one ahead, so that the next one's prompts are ready; near the end of the run a worker waits
        until it has nothing in hand, and leaves the last units to those who have nothing to do.
        """
        while (unit := self._claim()) is not None:
            yield unit

    def finish(self, unit: int, part: Part):
        """Write the part of a unit and give its claim back."""
        self.run.write_part(unit, part)
        self.release(unit)

    def wait(self) -> bool:
        """Wait until all units are done (True), or until one is to be had again, whose worker has died (False)."""
        pause = POLL
        while missing := self.run.missing():
            now = self._now()
            if any(self._claim_state(unit, now) != "held" for unit in missing):
                return False
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
        return True

    def release(self, unit: int):
        self._held.discard(unit)
        self._released.set()
        with contextlib.suppress(OSError):
            self._claim_path(unit).unlink()

    def _claim(self) -> int | None:
        for _ in range(2):
            while self._candidates:
                while self._held and len(self._candidates) <= TAIL:
                    self._released.wait()
                    self._released.clear()
                    if self._stop.is_set():
                        return None
                unit = self._candidates.popleft()
                if unit not in self._held and not self.run.is_done(unit) and self._take(unit):
                    return unit
            missing = self.run.missing()
            order = [unit for unit in missing if unit >= self._first] + [unit for unit in missing if unit < self._first]
            self._candidates = deque(unit for unit in order if unit not in self._held)
        return None

    def _take(self, unit) -> bool:
        """Create the claim. A dead one is removed first; if two workers do that at once, both run the unit at worst."""
        path = self._claim_path(unit)
        state = self._claim_state(unit, self._now()) if path.exists() else "free"
        if state == "held":
            return False
        try:
            if state == "dead":
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
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

    def _claim_state(self, unit, now: float) -> str:
        """Whether a unit is "free", "held" by a worker, or claimed by a "dead" one."""
        path = self._claim_path(unit)
        try:
            silent, owner = now - path.stat().st_mtime, _owner(path)
        except FileNotFoundError:
            return "free"
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
        try:
            path.touch()
            return path.stat().st_mtime
        except OSError as error:
            raise InputError(path, f"cannot be written: {error.strerror}") from None

    def _clock_path(self) -> Path:
        return self.run.path / "claims" / f".clock-{self._owner['host']}-{self._owner['pid']}"

    def _claim_path(self, unit) -> Path:
        return self.run.path / "claims" / f"{unit:06d}"


def _names(directory: Path) -> list[str]:
    """What a directory holds, without files that are being written."""
    try:
        return [entry.name for entry in os.scandir(directory) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(directory, f"cannot be read: {error.strerror}") from None


def _owner(path: Path) -> dict:
    """Who made a claim; nobody that is known where its file is not whole."""
    try:
        owner = json.loads(path.read_text())
    except ValueError:
        return {}
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror}") from None
    return owner if isinstance(owner, dict) else {}


def _check_manifest(manifest: dict, where):
    """Raise InputError naming the first field that is not what this class reads."""

    def expect(value, kind, field):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{where}: {field}", f"is not as written: {_short(value)}")
        return value

    expect(expect(manifest.get("model"), dict, "model").get("name"), str, "model.name")
    threads = manifest.get("threads")
    if threads is not None and expect(threads, int, "threads") < 1:
        raise InputError(f"{where}: threads", f"is not as written: {threads}")
    corpus = expect(manifest.get("corpus"), dict, "corpus")
    for name, kind in dict(
        file=str, sha256=str, n_prompts=int, columns=list, count=dict, weight=dict, digests=dict
    ).items():
        expect(corpus.get(name), kind, f"corpus.{name}")
    if Path(corpus["file"]).name != corpus["file"]:
        raise InputError(f"{where}: corpus.file", f"expected a file beside it, got {_short(corpus['file'])}")
    for unit in expect(corpus.get("units"), list, "corpus.units"):
        whole = isinstance(unit, list) and [type(value) for value in unit] == [int, int, int, str]
        if not whole or min(unit[:3]) < 0:
            raise InputError(f"{where}: corpus.units", f"is not as written: {_short(unit)}")


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
        if os.name == "posix":  # elsewhere 0 is a signal like others
            os.kill(pid, 0)
    except OSError as error:
        return None if isinstance(error, ProcessLookupError) else "running"
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


def first_difference(mine, theirs, field="") -> tuple[str, object, object] | None:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            found = first_difference(mine.get(name), theirs.get(name), f"{field}.{name}" if field else name)
            if found:
                return found
        return None
    return None if mine == theirs else (field, _short(mine), _short(theirs))


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
