"""The device that the Triton kernels run on here, and the cases that each plan can serve."""

import torch

from cna_kernels.triton import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHERE = "cuda" if DEVICE == "cuda" else "interpreted"


def servable(op, name, shape, dtype):
    T, N, H = shape
    tma = dtype.itemsize == 2 and N % 8 == 0 and H % 8 == 0
    return plan.can_serve(plan.Call(op, T, N, H, dtype, 90, tma), name)


def on_device(extras):
    """The optional arguments of an op, moved to DEVICE."""
    moved = {}
    for name, value in extras.items():
        if isinstance(value, torch.Tensor):
            value = value.to(DEVICE)
        elif value is not None:
            value = type(value)(*(part.to(DEVICE) for part in value))
        moved[name] = value
    return moved
