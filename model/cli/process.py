"""What lies around a command: streams that may be closed or full, Ctrl-C, errors as one line, exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any, cast

from cna_kernels.errors import InputError, InputWarning, one_line


def run(argv: list[str] | None) -> int:
    """Run the command that the words name; see :func:`cna_kernels.model.cli.main`."""
    own = argv is None  # nobody else is in this process
    if own:
        _on_interrupt(_leave)  # imports take seconds, and not all of them let KeyboardInterrupt through
    name = "cna"
    with _streams(), _warnings_as_lines():
        try:
            from . import parser

            args = parser.parse(sys.argv[1:] if argv is None else argv)
            name = f"cna {args.command}"
            command = parser.load(args)
            if own:
                _on_interrupt(signal.default_int_handler)
            command(args)
            sys.stdout.flush()
            return 0
        except SystemExit:  # --help, or a usage error
            return _flushed(name)
        except InputError as error:
            return _say(f"{name}: {error}", 2)
        except KeyboardInterrupt:
            return _say(f"{name}: interrupted", 130)
        except BrokenPipeError:  # whoever read stdout has closed it, as `| head` does
            _drop_stdout()
            return 1
        except OSError as error:  # errors of files are InputErrors above; this is mostly stdout, full or closed
            _drop_stdout()
            return _say(one_line(f"{name}: {error.filename or 'stdout'}: {error.strerror or error}"), 2)
        finally:
            if own:
                _on_interrupt(_leave)  # threads and exit functions may take their time


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return code


def _flushed(name: str) -> int:
    """Go on with a SystemExit, or return the exit code where what it printed cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop_stdout()
        return 1 if isinstance(error, BrokenPipeError) else _say(f"{name}: stdout: {error.strerror or error}", 2)
    raise


def _on_interrupt(handler: Any) -> None:
    with contextlib.suppress(ValueError):  # not the main thread: there nobody's Ctrl-C arrives
        signal.signal(signal.SIGINT, handler)


def _leave(*_) -> None:
    """End at once, without a traceback from wherever the process is."""
    with contextlib.suppress(OSError):
        os.write(2, b"cna: interrupted\n")
    os._exit(130)


def _drop_stdout() -> None:
    """Let what stdout still holds go nowhere, so that the interpreter's last flush is no error."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Quiet:
    """A text stream whose failures count for nothing: messages on a full disk must not end hours of work."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            self._stream.write(text)
        except (OSError, ValueError, AttributeError):  # AttributeError: there is no stream
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError, AttributeError):  # AttributeError: there is no stream
            self._drop()

    def _drop(self) -> None:
        """What the stream still holds goes nowhere: else the interpreter's last flush would change the exit code."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None and self._stream is sys.__stderr__:
                os.dup2(os.open(os.devnull, os.O_WRONLY), cast(Any, self._stream).fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """stdout that is closed raises OSError when it is flushed; stderr raises nothing, whatever it is."""
    before = sys.stdout, sys.stderr
    if None in before:
        for number in range(3):  # else a file that is opened later takes a closed stream's number
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w")  # noqa: SIM115
    elif hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal's encoding lacks
    sys.stderr = cast(Any, Quiet(open(os.devnull, "w") if sys.stderr is None else sys.stderr))  # noqa: SIM115
    try:
        yield
    finally:
        if before[0] is None:
            _drop_stdout()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """An InputWarning is one line on stderr. Other warnings look as they did."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message, category, *where, **more):
            if issubclass(category, InputWarning):
                print(f"cna: {one_line(str(message))}", file=sys.stderr, flush=True)
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", InputWarning)
        yield
