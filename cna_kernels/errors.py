"""One wording for what is wrong with an argument: tensors handed to an op, and files that a user names."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to load, and ``cna --help`` needs none of it
    import torch


class InputError(ValueError):
    """Input from outside the program that cannot be used; prints as one line ``where: what``.

    ``where`` names the file and, after a colon, the field. The command line prints it and exits with code 2.
    """

    if TYPE_CHECKING:  # torch.compile of PyTorch 2.11 cannot raise an error with an __init__ of its own

        def __init__(self, where: object, what: object) -> None: ...

    @property
    def where(self) -> str:
        """The file or argument, and its field."""
        return str(self.args[0])

    @property
    def what(self) -> str:
        """What is wrong with it."""
        return str(self.args[1])

    def __str__(self) -> str:
        # File contents may hold newlines, terminal escapes or megabytes; the message stays one printable line.
        return one_line(f"{self.where}: {self.what}")


class InputWarning(UserWarning):
    """Input that can be used, but perhaps not as its user thinks. The command line prints it as one line."""


def warn(text: str) -> None:
    """Warn in one printable line."""
    warnings.warn(one_line(text), InputWarning, stacklevel=2)


def one_line(text: str, longest: int = 500) -> str:
    """Return the text with what is not printable escaped, and its middle left out where it is long."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_tensor(
    name: str,
    x: torch.Tensor,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError naming the tensor, what was expected and what came.

    Args:
        shape: tuple of sizes; None in a place accepts any size there.
        dtype: one dtype or a tuple of them.
        device: the device it must live on.

    Rows must be contiguous (last stride 1); the row stride is free, so half of a fused gate/up tensor is fine.
    """
    if shape is not None:
        matches = x.dim() == len(shape) and all(
            want is None or want == got for want, got in zip(shape, x.shape, strict=True)
        )
        if not matches:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name}: expected shape [{wanted}], got {list(x.shape)}")
    if dtype is not None:
        accepted = dtype if isinstance(dtype, tuple) else (dtype,)
        if x.dtype not in accepted:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in accepted)
            raise ValueError(f"{name}: expected {wanted}, got {str(x.dtype).removeprefix('torch.')}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")
    if x.dim() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected stride 1 in the last dim, got strides {list(x.stride())}; call .contiguous()"
        )
