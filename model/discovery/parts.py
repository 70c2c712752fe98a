"""Parts: what each unit of a run adds, a file in the run directory. They are written, read, checked and merged here."""

from __future__ import annotations

import json
import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cna_kernels.errors import InputError
from cna_kernels.files import Digest

from .part_header import AGAIN, read_header
from .run_directory import POLL, RunDirectory, write_once
from .units import Part, SlotSums


def write_part(run: RunDirectory, unit: int, part: Part):
    """Write a unit's part as a whole file or not at all. A part that exists already stays."""
    tensors, counts = {}, {}
    for number, slot in part.slots.items():
        tensors[f"total.{number}"], counts[str(number)] = slot.total.contiguous(), slot.count
        if slot.total_sq is not None:
            tensors[f"total_sq.{number}"] = slot.total_sq.contiguous()
    if part.universal is not None:
        tensors["universal"] = part.universal
    facts = {
        "unit": unit,
        "fingerprint": run.fingerprint,
        "counts": counts,
        "n_universal": part.n_universal,
        "n_prompts": part.n_prompts,
        "n_tokens": part.n_tokens,
        "n_skipped": part.n_skipped,
        "skipped": part.skipped,
        "n_left_out": {str(column): count for column, count in part.n_left_out.items()},
    }
    # One entry of metadata: safetensors writes several in any order, but a part must have the same bytes every time.
    record = json.dumps({"facts": facts, "sha256": _hash(facts, tensors)}, sort_keys=True)
    write_once(run.part_path(unit), save(tensors, metadata={"part": record}))


def read_part(run: RunDirectory, unit: int) -> Part:
    """Read and check the part of a unit. Raises InputError naming the file if it is damaged or of another run."""
    path = run.part_path(unit)
    facts, expected = read_header(run, unit)
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"is no part of a run: {error}{AGAIN}") from None
    if _hash(facts, tensors) != expected:
        raise InputError(path, f"is damaged: its contents do not have the hash that it was written with{AGAIN}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name!r}", f"holds infinities or NaN{AGAIN}")
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


def merged(run: RunDirectory, patience: float = 0.0) -> Part:
    """Add all parts, in the order of their units. Raises InputError if a part is missing, damaged or of another run.

    Args:
        patience: seconds to wait for parts that another machine has written and this machine does not see yet.
    """
    deadline = time.monotonic() + patience
    while (missing := run.missing()) and time.monotonic() < deadline:
        time.sleep(POLL)
    if missing:
        raise InputError(run.path, f"{len(missing)} of {len(run.units)} units are not done")
    run.check_names()
    total = Part()
    for unit in range(len(run.units)):
        total += read_part(run, unit)
    _check_weights(run, total)
    return total


def _check_weights(run: RunDirectory, total: Part):
    """The parts together count what the manifest says that the prompts weigh."""
    columns, weight = run.manifest["corpus"]["columns"], run.manifest["corpus"]["weight"]
    for column, name in enumerate(columns):
        expected = weight.get(str(column), 0.0)
        got = total.slots[column].count if column in total.slots else 0.0
        skipped = total.n_left_out.get(column, 0) > 0
        if got > expected * (1 + 1e-6) or (not skipped and got < expected * (1 - 1e-6)):
            what = f"the parts count {got:g} for column {name!r}, manifest.json says {expected:g}"
            raise InputError(run.path / "parts", f"{what}; delete the parts, and the same command runs them again")


def check_parts(run: RunDirectory):
    """Refuse damaged files and parts of another run before any work; :func:`merged` also checks their tensors."""
    missing = set(run.missing())
    run.check_names()
    for unit in range(len(run.units)):
        if unit not in missing:
            read_header(run, unit)


def _hash(facts: dict, tensors: dict[str, torch.Tensor]) -> str:
    digest = Digest()
    digest.add(json.dumps(facts, sort_keys=True))
    for name in sorted(tensors):
        digest.add(name)
        digest.add(tensors[name].contiguous().numpy().tobytes())
    return str(digest)
