"""Compiler flags for C programs on the library that this package holds.

cc program.c $(python -m cna_kernels.cpu --cflags --libs)
"""

import argparse
import shlex
import sys

from .library import BUILD, PATH


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cna_kernels.cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--cflags", action="store_true", help="where cna.h lies")
    parser.add_argument("--libs", action="store_true", help="the library, to be found again when the program runs")
    args = parser.parse_args()
    if not (args.cflags or args.libs):
        parser.error("expected --cflags, --libs or both")
    reason = None
    if sys.platform == "darwin":
        reason = "on macOS a program can load this library but not link it; use 'make -C csrc install'"
    elif not PATH.exists():
        reason = f"{PATH} is missing: {BUILD}"
    if args.libs and reason:
        print(f"--libs: {reason}", file=sys.stderr)
        return 2
    directory = PATH.parent
    flags = [f"-I{directory}"] * args.cflags + [f"-L{directory}", "-lcna", f"-Wl,-rpath,{directory}"] * args.libs
    print(shlex.join(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
