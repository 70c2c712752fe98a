"""Launching: one place for what every launch has in common, and for what the host knows about the device.

A launcher is a function of tensors that allocates with ``empty`` and launches with ``launch``. Both report to the
recorder of ``repeat.py``, if this thread has one.
"""

from __future__ import annotations

import contextlib
import functools
import threading

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .tiles import INTERPRETED

LISTENING = threading.local()  # .recorder: records this thread's launches; .listed: a list that takes them instead


def launch(kernel, grid, *args, device, **options):
    """Launch a kernel on the tensors' own device, which need not be the current one.

    Multiply-adds are contracted (``enable_fp_fusion``) whatever the Triton version's default, so that the bits
    depend on the kernel alone.
    """
    options["enable_fp_fusion"] = True
    plain = [int(x) if type(x) is Distance else x for x in args]
    if is_listing():
        LISTENING.listed.append((kernel, grid, plain, options))
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        compiled = kernel[grid](*plain, **options)
    if recorder := getattr(LISTENING, "recorder", None):
        recorder.launched(kernel, compiled, grid, args, options)


def linear(x, w):
    """torch.nn.functional.linear, between launches: cuBLAS on NVIDIA devices."""
    return x.new_empty(x.shape[0], w.shape[0]) if is_listing() else F.linear(x, w)


@contextlib.contextmanager
def listing():
    """Launch nothing, and list as (kernel, grid, arguments, options) what this thread would launch."""
    outer, LISTENING.listed = getattr(LISTENING, "listed", None), []
    try:
        yield LISTENING.listed
    finally:
        LISTENING.listed = outer


def is_listing() -> bool:
    return getattr(LISTENING, "listed", None) is not None


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor of a launcher: its result or a workspace."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if recorder := getattr(LISTENING, "recorder", None):
        recorder.allocated(tensor)
    return tensor


class Distance(int):
    """The elements between the starts of two tensors of one dtype: an argument that depends on their addresses."""

    ends: tuple[Tensor, Tensor]


def distance(first: Tensor, second: Tensor) -> Distance:
    """The number of elements from the start of the first tensor to the start of the second, in any memory."""
    elements = Distance((second.data_ptr() - first.data_ptr()) // first.element_size())
    elements.ends = first, second
    return elements


def arch(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA device, 0 for any other. In the interpreter 90, so that every path is tested."""
    if INTERPRETED:
        return 90
    if device.type == "cuda":
        return _cuda_arch(device)
    target = triton.runtime.driver.active.get_current_target()  # no such device here: code is only compiled for it
    return target.arch if target.backend == "cuda" else 0


@functools.cache
def _cuda_arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 0 if torch.version.hip else 10 * major + minor


def has_pdl(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it still runs (programmatic dependent launch, sm_90 on)."""
    return not INTERPRETED and arch(device) >= 90


def dependent(device: torch.device, follows: bool = True) -> dict:
    """Options of a launch that ``follows`` another launch of this package: it may start early, and waits before it
    reads (``gdc_wait``)."""
    return dict(PDL=True, launch_pdl=True) if follows and has_pdl(device) else dict(PDL=False)


def registers(device: torch.device) -> dict:
    """Options of a launch whose threads may use all registers: without them ptxas spills a few registers where that
    lets one more program onto a multiprocessor."""
    return dict(maxnreg=255) if arch(device) else {}


@functools.cache
def n_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device: 132, as on an H100 or H200, where code is only compiled; 8 in the interpreter,
    where a program takes 20 ms."""
    if INTERPRETED:
        return 8
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
