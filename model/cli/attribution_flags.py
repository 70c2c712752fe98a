"""The flags of cna discover, cna estimate and cna status. ``attribution.py`` loads torch, this module does not."""

from __future__ import annotations

from .flags import (
    MODEL_HELP,
    command,
    count,
    device_flags,
    label,
    model_flags,
    positive,
    prompt_flags,
    seed,
    threads,
    whole,
)


def add(commands) -> None:
    """Add the commands discover, estimate and status."""
    _discover(commands)
    _estimate(commands)
    _status(commands)


def _discover(commands):
    parser = command(
        commands,
        "discover",
        "find a circuit from two prompt files",
        "cna discover path/to/model --positive refused.txt --negative answered.txt -o circuit.json\n"
        "  cna discover path/to/model --positive jbb.csv --negative other.jsonl --column Goal --top-k 200 -o c.json\n"
        "  cna discover path/to/model --contrasts behaviours.jsonl --bootstrap 100 -o circuits/",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--positive", metavar="FILE", help="prompts that show the behaviour")
    parser.add_argument("--negative", metavar="FILE", help="prompts that do not")
    parser.add_argument(
        "--label",
        metavar="NAME=VALUE",
        type=label,
        help="take both sides from --positive: records whose field NAME is VALUE (default 1) show the behaviour, the "
        "others do not",
    )
    parser.add_argument(
        "--contrasts",
        metavar="FILE",
        help='many behaviours at once, lines of {"prompt": TEXT, "columns": ["NAME.positive"]} or {NAME: WEIGHT}',
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        required=True,
        help="the circuit file to write; with --contrasts a directory for one file each and columns.safetensors",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=float, metavar="X", help="share of all neurons to keep (default: 0.001)")
    size.add_argument("--top-k", type=count, metavar="K", help="number of neurons to keep instead")
    parser.add_argument(
        "--score",
        choices=["abs-delta", "magnitude", "cohen-d", "norm-weighted", "relp"],
        help="what to rank by (default: abs-delta); relp needs gradients, and the whole model in memory",
    )
    universal = parser.add_mutually_exclusive_group()
    universal.add_argument(
        "--universal-prompts",
        metavar="FILE",
        help="diverse prompts for the universal filter (default: 24 built-in ones)",
    )
    universal.add_argument(
        "--universal-contrasts", metavar="FILE", help="diverse contrasts for the universal filter instead"
    )
    universal.add_argument("--no-universal", action="store_true", help="turn the universal filter off")
    parser.add_argument("--skip-layers", metavar="L,L", help="layers whose neurons are not candidates")
    parser.add_argument(
        "--preset", choices=["paper", "ref-code"], help="paper (default), or what the authors' public code does"
    )
    parser.add_argument(
        "--position",
        choices=["last", "all", "answer"],
        help="which tokens count: the prompt's last (default), all of it but the BOS, or those of its answer",
    )
    parser.add_argument(
        "--bootstrap",
        type=positive,
        metavar="R",
        help="say how often each neuron is selected when the prompts are drawn again R times, in the same pass",
    )
    parser.add_argument("--folds", type=positive, metavar="F", help="cross-validate over F parts of the prompts")
    parser.add_argument("--seed", type=seed, metavar="N", help="seed of the bootstrap (default: 0)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out lines that are no prompt, and prompts that are too long"
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="keep finished work here: the same command goes on after a crash; the workers of torchrun or --ray share "
        "the work, two commands at once both do all of it",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run the units of --run-dir on Ray: local for one of this machine and this command, or HOST:PORT",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, 1 << 16),
        metavar="N",
        help="with --ray: how many, each with the model (default: one a GPU)",
    )
    parser.add_argument("--unit", type=positive, metavar="N", help="prompts of a unit of work (default: 1024)")
    parser.add_argument(
        "--stream-layers",
        action="store_true",
        help="read the model layer by layer: memory for two layers and the prompts' hidden states is enough",
    )
    parser.add_argument(
        "--spill",
        metavar="DIR",
        help="where hidden states go that memory does not hold (default: --run-dir, or TMPDIR)",
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="threads on a CPU (default: PyTorch's)")
    parser.add_argument("--log-json", action="store_true", help="progress as JSON lines on stderr")
    prompt_flags(parser)
    model_flags(parser)
    parser.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="tokens a forward pass (default: 512, or 32768 on CUDA)"
    )


def _estimate(commands):
    parser = command(
        commands,
        "estimate",
        "what a discovery will need: memory, reads and time, before anything runs",
        "cna estimate path/to/model --prompts all.txt --stream-layers",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--prompts", metavar="FILE", required=True, help="all prompts of the discovery")
    parser.add_argument("--columns", type=whole(1, 1 << 20), default=2, metavar="C", help="sums to keep (default: 2)")
    parser.add_argument("--stream-layers", action="store_true", help="as for cna discover")
    parser.add_argument("--batch-tokens", type=positive, metavar="N", help="as for cna discover")
    prompt_flags(parser)
    device_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _status(commands):
    parser = command(commands, "status", "how far a run directory is", "cna status run/")
    parser.add_argument("run", metavar="DIR", help="the directory given to cna discover --run-dir")
    parser.add_argument("--json", action="store_true", help="print JSON")
