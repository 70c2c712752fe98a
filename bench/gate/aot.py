"""Ahead-of-time compilation without a GPU: the kernels that the launchers would launch, as machine code.

``Target`` stands in for the device. The launchers are called with tensors on the ``meta`` device, which have sizes and
strides but no memory. So the code that is read here is the code that a launch with such tensors would run.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import register_a
import sass
from cna_kernels.triton import launch

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory that one program may use


class Target(DriverBase):
    """A device that Triton can compile for, but not run on. Its capability is its device number: Triton's cache key."""

    def __init__(self, arch: int | str):
        self.arch = arch
        backend, warp = ("cuda", 32) if isinstance(arch, int) else ("hip", 64)
        self._target = GPUTarget(backend, arch, warp)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self._target

    def is_active(self):
        return True

    # Abstract in DriverBase. Triton asks for these only when it launches something.
    map_python_to_cpp_type = get_active_torch_device = get_benchmarker = None


@dataclass
class Compiled:
    """One kernel as one launch would run it."""

    kernel: str
    arch: int | str
    grid: tuple
    num_warps: int
    registers: int = 0
    spills: int = 0  # bytes of local memory stored or loaded
    shared: int = 0  # bytes
    counts: dict = field(default_factory=dict)  # instructions by group, whole kernel
    notices: list = field(default_factory=list)  # what ptxas said beyond its usual table
    loop: list = field(default_factory=list)  # instructions of the loop that does the work, opcodes in order
    block: dict = field(default_factory=dict)  # the constexpr arguments
    register_a: int = 0  # matrix instructions with their left factor in registers
    overwritten: list = field(default_factory=list)  # of these, those whose left factor is overwritten too early


def compile_launches(arch, call) -> list[Compiled]:
    """Return every kernel that ``call()`` would launch on ``arch`` (80, 90, 100, or "gfx942"), compiled."""
    triton.runtime.driver.set_active(Target(arch))
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    with launch.listing() as launches:
        call()
    return [_compile(arch, *each) for each in launches]


def _compile(arch, kernel, grid, args, options) -> Compiled:
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = kernel.warmup(*args, grid=grid, **options)
    metadata = compiled.metadata
    constants = {k: v for k, v in options.items() if k.isupper()}
    name = kernel.__name__.strip("_")
    result = Compiled(name, arch, grid, metadata.num_warps, shared=metadata.shared, block=constants)
    if isinstance(arch, int):
        if log.getvalue():
            _LOGS[compiled.hash] = log.getvalue()
        _read_cuda(result, _LOGS[compiled.hash], compiled.asm["cubin"])
    else:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        result.registers, result.spills = int(found["vgpr_count"]), int(found["vgpr_spill_count"])
    return result


_LOGS = {}  # what ptxas said of each kernel; Triton compiles it once in a process


def _read_cuda(result, log, cubin):
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory, "kernel.cubin")
        binary.write_bytes(cubin)
        nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        text = subprocess.run([nvdisasm, "-c", binary], capture_output=True, text=True, check=True).stdout
    result.registers = int(re.search(r"Used (\d+) registers", log)[1])
    result.spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    result.notices = re.findall(r"\(?(C\d{4})\)?", log)
    code = sass.instructions(text)
    opcodes = [one.opcode for one in code]
    result.counts = {name: sum(bool(re.match(pattern, o)) for o in opcodes) for name, pattern in GROUPS.items()}
    result.counts["all"] = len(opcodes)
    result.loop = sass.working_loop(code)
    result.register_a, result.overwritten = register_a.scan(text)


GROUPS = {
    "HGMMA": r"HGMMA",
    "UTCMMA": r"UTC\w*MMA",
    "HMMA": r"HMMA",
    "load128": r"(LDG|LDGSTS)\S*\.128",
    "tma": r"UTMALDG|UBLKCP",
    "store128": r"STG\S*\.128",
    "MUFU": r"MUFU",
    "local": r"(STL|LDL)",
}
