"""Devices: which can be used, how much memory they have, and how running out of memory shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from cna_kernels.errors import InputError

DEVICES = ("cpu", "cuda", "mps", "xpu")


def memory_of(device: torch.device | str) -> int | None:
    """Return the bytes that a model may use: a GPU's free memory, a CPU machine's whole memory; None if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


class DoesNotFit(InputError):
    """A call needs more memory than there is. Raised before the call allocates anything."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory ran out or does not suffice, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, DoesNotFit)) or "can't allocate memory" in str(error)


def in_halves(run: Callable[[Sequence], list], items: Sequence, device: torch.device) -> list:
    """Return ``run(items)``, one result for each item. Where memory runs out, run one half after the other."""
    try:
        return run(items)
    except (RuntimeError, DoesNotFit) as error:
        if not is_out_of_memory(error) or len(items) == 1:
            raise
    if device.type == "cuda":  # outside the except block: its traceback would keep the tensors alive
        torch.cuda.empty_cache()
    half = len(items) // 2
    return [*in_halves(run, items[:half], device), *in_halves(run, items[half:], device)]


def default_device() -> str:
    """Where a model goes unless its user says: a GPU where there is one, under torchrun another for each worker."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def usable_device(device: torch.device | str | None) -> torch.device:
    """Return the device, a GPU with its number; None is :func:`default_device`.

    Raises:
        InputError: this machine does not have the device.
    """
    device = default_device() if device is None else device
    if str(device).split(":")[0] not in DEVICES:
        raise InputError("device", f"expected one of {', '.join(DEVICES)}, got {str(device)!r}")
    try:
        device = torch.device(device)
        torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", f"{device} cannot be used: {error}") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
