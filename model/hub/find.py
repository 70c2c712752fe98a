"""Which checkpoint a user means by MODEL: a path, a name of the demonstration, or a name on the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cna_kernels.files import FilePath

from ..demo.checkpoint import demo_checkpoint
from .fetch import fetch_circuit, fetch_model
from .names import cached_name, checkpoint_name, hub_name


@dataclass(frozen=True)
class Found:
    """A checkpoint on this machine.

    Attributes:
        path: its directory or GGUF file.
        asked: what was asked for.
    """

    path: Path
    asked: str

    @property
    def name(self) -> str:
        """Its name: in the Hub's cache that on the Hub, elsewhere that of the directory or file."""
        return checkpoint_name(self.path)

    @property
    def short(self) -> str:
        """Its name without slashes."""
        cached = cached_name(self.path)
        return self.name if cached is None else (cached.file or cached.repo).rpartition("/")[2]

    @property
    def origin(self) -> str:
        """``, commit HASH of the Hub, asked for as 'NAME'``; nothing for a path elsewhere."""
        cached = cached_name(self.path)
        if cached is None:
            return ""
        asked = "" if hub_name(self.asked) is None else f", asked for as {self.asked!r}"
        return f", commit {cached.revision}{asked}"


def find_model(model: FilePath) -> Found:
    """Return where a checkpoint lies. One on the Hub is fetched unless the cache has it.

    Args:
        model: a path; ``demo:NAME``; or a name on the Hub: ``org/name``, ``org/name@REVISION``, ``org/name:FILE.gguf``.
            What exists as a path is a path.

    Raises:
        InputError: naming what cannot be fetched, and why.
    """
    text = os.fspath(model)
    if isinstance(model, str) and text.startswith("demo:") and not os.path.lexists(text):
        return Found(Path(demo_checkpoint(text.removeprefix("demo:"))), text)
    name = hub_name(model)
    return Found(Path(model) if name is None else fetch_model(name), text)


def circuit_path(path: FilePath) -> Path:
    """Return where a circuit file lies; ``org/name:circuit.json@REVISION`` is fetched from the Hub."""
    name = hub_name(path)
    return Path(path) if name is None or name.file is None else fetch_circuit(name)
