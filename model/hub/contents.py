"""What goes to the Hub and comes from it: circuits, and adapters as `cna export` writes them, nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.fields import REQUIRED, Fields, short
from cna_kernels.files import FilePath, open_regular, read_json, read_text

from ..checkpoint.lora import CARD, CONFIG, TAG, WEIGHTS

_TENSOR = re.compile(r"base_model\.model\.model\.(layers\.\d+\.mlp\.down_proj)\.lora_([AB])\.weight")
_FIELDS = (  # of an adapter's settings, as `cna export` writes them
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "bias"),
    *("fan_in_fan_out", "inference_mode", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern"),
)
_MOST = 1 << 20  # the largest rank


@dataclass(frozen=True)
class Adapter:
    """A checked adapter.

    Attributes:
        folder: where it lies in its directory or repository: "" or, of several that belong together, "1/", "2/", ...
        base_model, revision: what it records as the model that it is for.
    """

    folder: str
    base_model: str
    revision: str | None


def read_circuits(paths: Iterable[FilePath]) -> dict[str, Circuit]:
    """Read circuit files to share, by the names that they get in the repository: those of the files.

    Raises:
        InputError: a file is no circuit, is JSON of the public code, or has the name of another.
    """
    found: dict[str, Circuit] = {}
    for path in paths:
        record = read_json(path)
        circuit = Circuit.from_record(record, path)
        name = Path(path).name
        if "schema_version" not in record:
            raise InputError(path, "is JSON of the public code, which names no model and may hold a prompt")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.json", name, re.ASCII) or name == CONFIG:
            raise InputError(path, "expected a name of letters, digits, ., - and _ that ends in .json")
        if name in found:
            raise InputError(path, f"two files are called {name}")
        found[name] = circuit
    return found


def is_circuit(path: Path) -> bool:
    """Whether a JSON file says that it is a circuit, a faulty one too."""
    record = read_json(path)
    return isinstance(record, dict) and "neurons" in record


def read_adapters(directory: FilePath) -> list[Adapter]:
    """Check the adapter of a directory, or the several in its folders 1, 2, ...; none where it holds none.

    Raises:
        InputError: naming the file and field that are not as `cna export` writes them.
    """
    folders = [""] if os.path.lexists(Path(directory, CONFIG)) else []
    while not folders or folders[0]:
        folder = f"{len(folders) + 1}/"
        if not os.path.lexists(Path(directory, folder, CONFIG)):
            break
        folders.append(folder)
    return [_check_adapter(Path(directory), folder) for folder in folders]


def _check_adapter(directory: Path, folder: str) -> Adapter:
    path = directory / folder / CONFIG
    fields = Fields(read_json(path, limit=16 << 20), path)
    fields.only(_FIELDS, "an adapter that cna export writes")
    fields.one_of("peft_type", ("LORA",))
    fields.one_of("task_type", ("CAUSAL_LM",))
    largest = fields.integer("r", (1, _MOST))
    fields.integer("lora_alpha", (1, _MOST))
    fields.items("target_modules", lambda x: isinstance(x, str), "the name of a module")
    ranks = fields.object("rank_pattern", Fields({}, path))
    for name in ranks.record:
        ranks.integer(name, (1, _MOST))
    _check_weights(directory / folder / WEIGHTS, largest, ranks.record)
    return Adapter(folder, fields.read("base_model_name_or_path", REQUIRED, "text", lambda x: isinstance(x, str)),
                   fields.text("revision", None))  # fmt: skip


def _check_weights(path: Path, largest: int, ranks: dict[str, int]) -> None:
    """Raise InputError unless a file holds the pairs A ``[rank, N]`` and B ``[H, rank]`` of down-projections."""
    open_regular(path).close()
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"is no safetensors file: {error}") from None
    sides: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise InputError(f"{path}: {short(name)}", "is no tensor of an adapter that cna export writes")
        sides.setdefault(found[1], set()).add(found[2])
        rank = ranks.get(found[1], largest)
        if len(shape) != 2 or shape[0 if found[2] == "A" else 1] != rank:
            raise InputError(f"{path}: {name}", f"expected rank {rank}, got shape {list(shape)}")
    lonely = next((module for module, found in sides.items() if len(found) < 2), None)
    if lonely or not sides:
        raise InputError(path, f"has one half of {lonely}" if lonely else "holds no tensor")


def card_of(directory: Path, adapter: Adapter) -> str:
    """The card that `cna export` wrote beside an adapter, with the base model that the adapter records now.

    Raises:
        InputError: there is no such card.
    """
    path = directory / adapter.folder / CARD
    text = read_text(path, limit=_MOST)
    if f"\n- {TAG}\n" not in text:
        raise InputError(path, "is not the card of an adapter that cna export wrote")
    return re.sub(r"(?m)^base_model: .*$", lambda _: f'base_model: "{adapter.base_model}"', text, count=1)
