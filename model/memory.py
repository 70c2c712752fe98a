"""Devices: which can be used, how much memory there is, and how a lack of it shows."""

from __future__ import annotations

import os

import torch

from cna_kernels.checks import InputError

DEVICES = ("cpu", "cuda", "mps", "xpu")


def memory_of(device) -> int | None:
    """Return the bytes a model may use: free memory of a GPU, all memory of this machine; None where unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error says that an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def usable_device(device) -> torch.device:
    """The device, with its number; InputError for one that this machine does not have."""
    if str(device).split(":")[0] not in DEVICES:
        raise InputError("device", f"expected one of {', '.join(DEVICES)}, got {str(device)!r}")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", f"{device} cannot be used: {error}") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
