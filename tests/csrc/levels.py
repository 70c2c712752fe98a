"""The instruction-set levels that tests of the CPU engine run at: those of this machine.

If the machine has bf16 products but no AMX, the AMX level runs, too, with its tile instructions as plain loops.
"""

import shutil
import subprocess
from pathlib import Path

from cna_kernels.cpu import library

CSRC = Path(__file__).resolve().parents[2] / "csrc"
EMULATED = "amx-emulated"
LEVELS = [] if library.missing() else library.levels()
if LEVELS and LEVELS[-1] == "avx512_bf16" and shutil.which("make") and CSRC.exists():
    LEVELS = [*LEVELS, EMULATED]


def make(*arguments):
    done = subprocess.run(
        ["make", "-s", "-j2", "-C", str(CSRC), *arguments], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
