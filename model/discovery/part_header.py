"""What a part's file says of itself, checked without torch: `cna status` answers at once, and names damaged parts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields, is_whole, short
from cna_kernels.files import open_regular, parse_json

if TYPE_CHECKING:
    from .run_directory import RunDirectory

AGAIN = "; delete it, and the same command runs its unit again"
_LARGEST = 64 << 20  # bytes of a header
_MOST = 1 << 62
_DTYPES = {"F64": 8, "I64": 8}  # and their bytes


def read_header(run: RunDirectory, unit: int) -> tuple[dict[str, Any], str]:
    """The facts of a unit's part, and the hash that its contents must have.

    Raises:
        InputError: naming the file. It is no part, is cut off, belongs to another run or unit, or holds other counts
            or tensors than the run's manifest asks for.
    """
    path = run.part_path(unit)
    try:
        tensors, record = _header(path)
        fields = Fields(record, path)
        facts, expected = fields.object("facts"), fields.text("sha256")
        if facts.text("fingerprint") != run.fingerprint:
            raise InputError(path, f"belongs to another run than {run.path / 'manifest.json'}")
        if (number := facts.integer("unit", (0, _MOST))) != unit:
            raise InputError(path, f"holds unit {number}, its name says {unit}")
        _check_facts(facts, run.units[unit].n_prompts)
        _check_tensors(tensors, facts.record, run.manifest, path)
    except InputError as error:
        raise InputError(error.where, error.what + AGAIN) from None
    return facts.record, expected


def _header(path: Path) -> tuple[dict[str, Any], Any]:
    """The tensors that a safetensors file declares, and the record among its metadata."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LARGEST, size - 8):
            raise InputError(path, f"is no part of a run: {size} bytes, header of {length}")
        try:
            text = file.read(length).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(path, "is no part of a run: its header is not UTF-8") from None
    tensors = Fields(parse_json(text, path), path).record
    metadata = tensors.pop("__metadata__", None)
    part = metadata.get("part") if isinstance(metadata, dict) else None
    if not isinstance(part, str):
        raise InputError(path, "is no part of a run: its metadata have no part")
    end = 0
    for name, record in tensors.items():
        fields = Fields(record, path, f"{short(name)}.")
        dtype = fields.one_of("dtype", _DTYPES)
        shape = fields.items("shape", lambda n: is_whole(n) and 0 <= n <= _MOST, "sizes")
        offsets = fields.items("data_offsets", lambda n: is_whole(n) and 0 <= n <= _MOST, "offsets")
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype]:
            raise fields.error("data_offsets", f"do not span {dtype} {shape}")
        end = max(end, offsets[1])
    if 8 + length + end != size:
        raise InputError(
            path, f"is no part of a run: cut off, or has extra bytes: expected {8 + length + end}, got {size}"
        )
    return tensors, parse_json(part, path)


def _check_facts(facts: Fields, n_prompts: int):
    counts = facts.object("counts")
    for name in counts.record:
        if not (name.isascii() and name.isdecimal() and len(name) <= 9):
            raise counts.error(name, "is no number of a sum")
        counts.number(name, (0, 1e300))
    left_out = facts.object("n_left_out")
    for name in left_out.record:
        if not (name.isascii() and name.isdecimal() and len(name) <= 9):
            raise left_out.error(name, "is no number of a column")
        left_out.integer(name, (0, _MOST))
    for name in ("n_universal", "n_tokens"):
        facts.integer(name, (0, _MOST))
    ran, skipped = (facts.integer(name, (0, _MOST)) for name in ("n_prompts", "n_skipped"))
    if ran + skipped != n_prompts:
        raise facts.error(
            "n_prompts", f"expected {n_prompts} with those skipped, as the manifest says, got {ran + skipped}"
        )
    facts.items("skipped", lambda x: isinstance(x, str), "reasons")


def _check_tensors(tensors: dict[str, Any], facts: dict[str, Any], manifest: dict[str, Any], path: Path):
    """The tensors are those of the facts' counts, each in the model's shape."""
    squares, derived_squares = manifest.get("squares") or (False, False)
    n_columns = len(manifest["corpus"]["columns"])
    expected = {}
    for number in facts["counts"]:
        expected[f"total.{number}"] = "F64"
        if squares and (int(number) < n_columns or derived_squares):
            expected[f"total_sq.{number}"] = "F64"
    if "universal" in tensors or facts["n_universal"]:
        expected["universal"] = "I64"
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise InputError(f"{path}: {name!r}", "is missing" if name in expected else "is no sum of this run")
    shape = manifest.get("shape")
    for name, record in tensors.items():
        if record["dtype"] != expected[name] or record["shape"] != (shape or record["shape"]):
            got = f"{record['dtype']} {record['shape']}"
            raise InputError(f"{path}: {name!r}", f"expected {expected[name]} {shape or ''}, got {got}")
