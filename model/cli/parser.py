"""The command line's parser. A command's own module is imported when it runs, so that --help answers at once."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from importlib import import_module

import cna_kernels
from cna_kernels.errors import InputError, one_line

from . import attribution_flags, evaluation_flags
from .flags import DTYPES, MODEL_HELP, Parser, command, model_flags, positive, prompt_flags

# The module of model/cli that holds run_COMMAND.
MODULES = dict(demo="demo", show="show", run="run", export="export", doctor="doctor", status="status")
MODULES |= dict.fromkeys(("discover", "estimate"), "attribution")
MODULES |= dict.fromkeys(("eval", "sweep", "compare", "lm-eval"), "evaluation")


def build_parser() -> Parser:
    parser = Parser(prog="cna", description="Find and steer the MLP neurons behind a behaviour of a language model.")
    parser.add_argument("--version", action="version", version=f"cna {cna_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = command(commands, "demo", "the whole story on the bundled models", "cna demo --out demo-out")
    demo.add_argument("--out", metavar="DIR", default="demo-out", help="for report and pictures (default: %(default)s)")

    attribution_flags.add(commands)

    show = command(commands, "show", "print a circuit file", "cna show circuit.json")
    show.add_argument("circuit", metavar="CIRCUIT", help="circuit file")
    show.add_argument("--json", action="store_true", help="print JSON")

    run = command(
        commands,
        "run",
        "answer prompts, unsteered and steered side by side",
        'cna run path/to/model -c circuit.json -m 0 -p "How do I open the vault?"\n'
        "  cna run path/to/model -c circuit.json -m 0,0.5,2 --prompts questions.txt --json",
    )
    run.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    run.add_argument("-c", "--circuit", metavar="FILE", help="circuit file; without one the model just answers")
    run.add_argument(
        "-m",
        "--multiplier",
        metavar="M,M",
        default="0",
        help="0 ablates, 1 is baseline, above 1 amplifies (default: 0)",
    )
    run.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="a prompt; may be given again")
    run.add_argument("--prompts", metavar="FILE", help="a prompt file")
    run.add_argument(
        "--any-model", action="store_true", help="accept a circuit found in another checkpoint of the same shape"
    )
    run.add_argument(
        "--max-new-tokens", type=int, default=150, metavar="N", help="longest answer (default: %(default)s)"
    )
    run.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    run.add_argument(
        "--sample-top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; 0 is off"
    )
    run.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens up to this probability"
    )
    run.add_argument("--seed", type=int, default=0, metavar="N", help="seed for sampling (default: %(default)s)")
    prompt_flags(run)
    model_flags(run)

    export = command(
        commands,
        "export",
        "a circuit at a multiplier as a LoRA adapter, a checkpoint, or the public code's JSON",
        "cna export path/to/model -c circuit.json -m 0 --to lora -o adapter/\n"
        "  cna export path/to/model -c a.json -c b.json -m 0,0.5 --to checkpoint -o steered/",
    )
    export.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    export.add_argument(
        "-c", "--circuit", metavar="FILE", action="append", required=True, help="circuit file; may be given again"
    )
    export.add_argument(
        "-m", "--multiplier", metavar="M,M", default="0", help="one for all circuits, or one for each (default: 0)"
    )
    export.add_argument("--to", choices=["lora", "checkpoint", "ref-code"], required=True, help="what to write")
    export.add_argument("-o", "--output", metavar="PATH", required=True, help="directory to make; for ref-code a file")
    export.add_argument("--max-rank", type=positive, metavar="R", help="lora: the largest rank the engine takes")
    export.add_argument("--split", action="store_true", help="lora: several adapters where --max-rank is too small")
    export.add_argument(
        "--uniform-rank", action="store_true", help="lora: the same rank in every layer, padded with zeros"
    )
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="lora: of the adapter (default: float32)")
    export.add_argument(
        "--any-model", action="store_true", help="accept a circuit found in another checkpoint of the same shape"
    )

    evaluation_flags.add(commands)

    doctor = command(commands, "doctor", "what is live here: backends, devices, versions", "cna doctor --json")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done. 2: input cannot be used; one line on stderr says why. 130: Ctrl-C. 1: nobody reads stdout any more.
    """
    words = sys.argv[1:] if argv is None else argv
    own = words[:1] if words[:1] == ["lm-eval"] else words  # lm-evaluation-harness parses the other words
    args = build_parser().parse_args(_with_signs(own))
    args.words = words[1:]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal's encoding lacks
    before, warnings.showwarning = warnings.showwarning, partial(_say_warning, args.command)
    try:
        run = f"run_{args.command.replace('-', '_')}"
        getattr(import_module(f".{MODULES[args.command]}", __package__), run)(args)
        sys.stdout.flush()
        return 0
    except InputError as error:
        print(f"cna {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cna {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read stdout has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # errors of files are InputErrors above; this is mostly stdout, full or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"cna {args.command}: {error.filename or 'stdout'}: {error.strerror or error}", file=sys.stderr)
        return 2
    finally:
        warnings.showwarning = before


def _say_warning(command: str, message, *_, **__) -> None:
    """Show a warning as one line, without the place in the source."""
    print(f"cna {command}: {one_line(str(message))}", file=sys.stderr)


def _with_signs(argv: list[str]) -> list[str]:
    """Join ``-m -1,0`` into ``-m=-1,0``: argparse takes a list that starts with a minus for an option."""
    joined: list[str] = []
    for word in argv:
        is_list = word[:1] == "-" and word[1:2] in tuple("0123456789.") and len(word) > 1
        if is_list and joined and joined[-1] in ("-m", "--m", "--multiplier"):
            joined[-1] += ("" if joined[-1] == "-m" else "=") + word
        else:
            joined.append(word)
    return joined
