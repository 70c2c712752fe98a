"""The circuits that requests name: given when the engine starts, added and removed while it serves."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

from ..circuit import Circuit, check_fits
from ..errors import InputError
from ..fields import short
from ..files import FilePath, write_text

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


class Registry:
    """Circuits by name, for one model.

    Args:
        circuits: files by name, or a directory of files ``NAME.json``. Files of a directory are read again when they
            change; several processes that serve one engine see the same.
        n_layers, n_neurons: the shape of the model.
        check: raises InputError for a circuit of another model; its second argument is the circuit's name.

    Raises:
        InputError: a file is no circuit, or a circuit of another model.
    """

    def __init__(
        self,
        circuits: dict[str, str] | str,
        n_layers: int,
        n_neurons: int,
        check: Callable[[Circuit, FilePath], None] = lambda circuit, where: None,
    ) -> None:
        self._shape, self._check = (n_layers, n_neurons), check
        self._lock = threading.Lock()
        self._held: dict[str, Circuit] = {}
        self._read: dict[str, tuple[tuple[int, ...], Circuit]] = {}  # of the directory: a file's stamp and its circuit
        self._directory = Path(circuits) if isinstance(circuits, str) else None
        if self._directory is not None and not self._directory.is_dir():
            raise InputError(circuits, "is no directory of circuits")
        if isinstance(circuits, dict):
            for name, path in circuits.items():
                self._held[check_name(name)] = self._load(path)
        for name in self.names():
            self.get(name)

    def names(self) -> list[str]:
        """The names, sorted."""
        names = set(self._held)
        if self._directory is not None:
            names |= {path.stem for path in self._directory.glob("*.json") if _NAME.fullmatch(path.stem)}
        return sorted(names)

    def get(self, name: str) -> Circuit:
        """The circuit of this name, as it is now. Raises InputError."""
        if self._directory is None:
            circuit = self._held.get(name)
            if circuit is None:
                raise self._unknown(name)
            return circuit
        path = self._path(name)
        try:
            found = os.stat(path)
        except OSError:
            raise self._unknown(name) from None
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        with self._lock:
            known = self._read.get(name)
            if known is None or known[0] != stamp:
                known = self._read[name] = stamp, self._load(path)
        return known[1]

    def put(self, name: str, circuit: Circuit) -> None:
        """Add a circuit, or put it in the place of the one of this name. Requests that run keep theirs."""
        check_name(name)
        self._check_circuit(circuit, name)
        if self._directory is None:
            self._held[name] = circuit
        else:
            write_text(self._path(name), circuit.to_json())

    def remove(self, name: str) -> None:
        """Forget a name. Requests that run keep their circuit."""
        self.get(name)
        if self._directory is None:
            self._held.pop(name, None)
        else:
            self._path(name).unlink(missing_ok=True)

    def read_file(self, path: FilePath) -> Circuit:
        """The circuit in a file, checked against the model."""
        return self._load(path)

    def _path(self, name: str) -> Path:
        """The file of a name, which lies in the directory wherever links lead."""
        assert self._directory is not None
        path = self._directory / f"{check_name(name)}.json"
        if path.resolve().parent != self._directory.resolve():
            raise InputError(path, "leads out of the directory of circuits")
        return path

    def _load(self, path: FilePath) -> Circuit:
        circuit = Circuit.load(path, n_layers=self._shape[0], n_neurons=self._shape[1])
        self._check_circuit(circuit, path)
        return circuit

    def _check_circuit(self, circuit: Circuit, where: FilePath) -> None:
        check_fits(circuit, *self._shape, where)
        if not circuit.k:
            raise InputError(f"{where}: neurons", "expected at least one")
        self._check(circuit, where)

    def _unknown(self, name: object) -> InputError:
        known = self.names()
        some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        return InputError("cna_circuit", f"no circuit {short(name)}; known are {some or 'none'}")


def check_name(name: object) -> str:
    """Return a circuit's name. Raises InputError unless it can be a file's name, and nothing but that."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError("cna_circuit", f"expected letters, digits, '.', '_' and '-', got {short(name)}")
    return name
