"""The command line's parser. A command's own module is imported when it runs, so that --help answers at once."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib import import_module

import cna_kernels

from . import attribution_flags, evaluation_flags, reproduce_flags
from .flags import (
    DTYPES,
    GIVEN,
    MODEL_HELP,
    Parser,
    circuit_flags,
    command,
    engine_flag,
    model_flags,
    number,
    positive,
    prompt_flags,
    seed,
    whole,
)
from .on_ranks import FLAG, on_ranks

# The module of model/cli that holds run_COMMAND.
MODULES = dict(
    demo="demo", show="show", run="run", export="export", quantize="quantize", doctor="doctor", status="status"
)
MODULES |= dict.fromkeys(("discover", "estimate"), "attribution")
MODULES |= dict.fromkeys(("eval", "sweep", "compare", "lm-eval"), "evaluation") | {"matrix": "matrix"}
MODULES |= {"reproduce": "reproduce", "push": "hub", "pull": "hub"}


def build_parser() -> Parser:
    parser = Parser(prog="cna", description="Find and steer the MLP neurons behind a behaviour of a language model.")
    parser.add_argument("--version", action="version", version=f"cna {cna_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = command(
        commands,
        "demo",
        "what steering does to a real model, SmolLM2-135M-Instruct",
        "cna demo --out demo-out\n  cna demo --bundled",
    )
    demo.add_argument("--bundled", action="store_true", help="the small models that come with the project instead")
    demo.add_argument(
        "--out", metavar="DIR", help="for report and pictures (default: demo-out, with --bundled demo-bundled-out)"
    )

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
    circuit_flags(run, required=False, what="circuit file; several steer together; without one the model just answers")
    run.add_argument(
        "-m",
        "--multiplier",
        metavar="M,M",
        default="0",
        help="0 ablates, 1 is baseline, above 1 scales up (default: 0); several with one circuit: a column each",
    )
    run.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="a prompt; may be given again")
    run.add_argument("--prompts", metavar="FILE", help="a prompt file")
    run.add_argument(
        "--max-new-tokens", type=positive, default=150, metavar="N", help="longest answer (default: %(default)s)"
    )
    run.add_argument("--temperature", type=number(0, 1e6), default=0.0, metavar="T", help="0 is greedy (default)")
    run.add_argument(
        "--sample-top-k",
        type=whole(0, 1 << 40),
        default=0,
        metavar="K",
        help="sample from the K likeliest tokens; 0 is off",
    )
    run.add_argument(
        "--top-p",
        type=number(0, 1),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens up to this probability",
    )
    run.add_argument("--seed", type=seed, default=0, metavar="N", help="seed for sampling (default: %(default)s)")
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
    circuit_flags(export, required=True, what="circuit file; several are exported together")
    export.add_argument(
        "-m", "--multiplier", metavar="M,M", default="0", help="one for all circuits, or one for each (default: 0)"
    )
    export.add_argument("--to", choices=["lora", "checkpoint", "ref-code"], required=True, help="what to write")
    export.add_argument("-o", "--output", metavar="PATH", required=True, help="directory to make; for ref-code a file")
    export.add_argument(
        "--for", dest="reader", choices=["peft", "llama.cpp", "vllm", "sglang"],
        help="lora: the engine that will read it (default: the form that most engines read)",
    )  # fmt: skip
    export.add_argument("--base-model", metavar="NAME", help="lora: the base model that the adapter records")
    export.add_argument("--max-rank", type=positive, metavar="R", help="lora: the largest rank the engine takes")
    export.add_argument("--split", action="store_true", help="lora: several adapters where --max-rank is too small")
    export.add_argument(
        "--uniform-rank", action="store_true", help="lora: the same rank in every layer, padded with zeros"
    )
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="lora: of the adapter (default: float32)")
    engine_flag(export)

    quantize = command(
        commands,
        "quantize",
        "a checkpoint as a GGUF file with block-quantised weights",
        "cna quantize path/to/model --to q8_0 -o model.gguf",
    )
    quantize.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    quantize.add_argument("--to", metavar="TYPE", required=True, help="q8_0, q5_0, q4_1 or q4_0")
    quantize.add_argument("-o", "--output", metavar="FILE", required=True, help="file to make; its name ends in .gguf")

    push = command(
        commands,
        "push",
        "circuits, or a LoRA adapter, to a repository on the Hugging Face Hub, with a model card",
        "cna push circuit.json org/name\n  cna push adapter/ org/name --private",
    )
    push.add_argument("paths", metavar="PATH", nargs="+", help="circuit files, or a directory of cna export --to lora")
    push.add_argument("repo", metavar="REPO", help="org/name; made unless it exists")
    push.add_argument("--private", action="store_true", help="make a private repository; a public one is refused")
    push.add_argument("--revision", metavar="BRANCH", help="the branch; made unless it exists (default: main)")
    push.add_argument("--message", metavar="TEXT", help="of the commit")

    pull = command(
        commands,
        "pull",
        "the circuits, or the LoRA adapter, of a repository on the Hugging Face Hub, checked",
        "cna pull org/name -o circuits/\n  cna pull org/name:circuit.json@main -o circuit.json",
    )
    pull.add_argument("repo", metavar="REPO", help="org/name, org/name:FILE for one circuit; @REVISION behind it")
    pull.add_argument("-o", "--output", metavar="PATH", required=True, help="directory to make, or one circuit's file")

    evaluation_flags.add(commands)
    reproduce_flags.add(commands)

    doctor = command(
        commands,
        "doctor",
        "what is live here: backends, devices, versions; or how a checkpoint is read",
        "cna doctor --json\n  cna doctor path/to/model.gguf",
    )
    doctor.add_argument("model", metavar="MODEL", nargs="?", help=f"say of this one how it is read: {MODEL_HELP}")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def parse(words: list[str]) -> Namespace:
    """The arguments of a command. SystemExit after --help and for words that are no arguments."""
    own = words[:1] if words[:1] == ["lm-eval"] else words  # lm-evaluation-harness parses the other words
    args = build_parser().parse_args(_with_signs(own))
    vars(args).pop(GIVEN, None)
    args.words = words[1:]
    if args.command == "lm-eval":
        _own_flag(args)
    return args


def _own_flag(args: Namespace) -> None:
    """Take --tensor-parallel, which the harness does not know, out of its words; read its --device."""
    args.tensor_parallel = FLAG in args.words
    args.words = [word for word in args.words if word != FLAG]
    args.device = None
    for word, following in zip(args.words, [*args.words[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name == "--device":
            args.device = value if equals else following


def load(args: Namespace) -> Callable[[Namespace], None]:
    """The function that runs a command, from its module."""
    name = f"run_{args.command.replace('-', '_')}"
    run: Callable[[Namespace], None] = getattr(import_module(f".{MODULES[args.command]}", __package__), name)
    return on_ranks(run) if getattr(args, "tensor_parallel", False) else run


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
