"""The command line: the parser, the commands, and what they show."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done. 2: input cannot be used, or stdout is closed or full; one line on stderr says why. 130: Ctrl-C. 1: nobody
    reads stdout any more.

    Args:
        argv: the words after ``cna``. None takes those of this process, whose signals are then the command's.
    """
    try:
        from .process import run  # imported here so that Ctrl-C while it is imported is no traceback

        return run(argv)
    except KeyboardInterrupt:
        return 130
