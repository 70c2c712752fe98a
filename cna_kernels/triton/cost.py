"""What a kernel must move, compute and issue, and the time that this predicts: a measurement is compared with it.

The files of the products and of ``swiglu`` have a ``cost`` each. It counts bytes and operations from the formula. The
instructions for a weight or an element come from the machine code of the multiply-add kernels and of ``swiglu``:
``make compile-gate`` reads that code, and fails when the count is a quarter away from what ``cost`` uses.
"""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Ceilings of a device."""

    name: str
    bytes_per_s: float  # device copy, bytes read plus written
    flop_per_s: float  # bf16 matrix product on random data
    instructions_per_s: float  # warp instructions issued, 4 a clock and multiprocessor


# The first two figures are measured on an H200 with PyTorch. The third is 132 multiprocessors at the 1.98 GHz that the
# card reported under load.
H200 = Device("NVIDIA H200", 4.3e12, 790e12, 132 * 4 * 1.98e9)


class Cost(NamedTuple):
    bytes: float
    flop: float  # on the matrix units
    instructions: float  # of a warp, in the loop that does the work; 0 where the matrix units do it

    def seconds(self, device: Device = H200) -> dict[str, float]:
        """The time each resource alone would take; the largest is the prediction."""
        return {
            "memory": self.bytes / device.bytes_per_s,
            "matrix": self.flop / device.flop_per_s,
            "issue": self.instructions / device.instructions_per_s,
        }


def instructions(per_item: float, items: float) -> float:
    """Warp instructions for so many elements or weights at so many instructions each."""
    return per_item * items / 32
