"""The flags of cna reproduce. ``reproduce.py`` loads torch, this module does not."""

from __future__ import annotations

from .flags import MODEL_HELP, command, model_flags, positive, prompt_flags, seed, whole


def add(commands) -> None:
    """Add the command reproduce."""
    parser = command(
        commands,
        "reproduce",
        "the tables of arXiv 2605.12290 on a model at hand, each figure beside the paper's, from local files",
        "cna reproduce demo:smollm2 -o reproduced/\n"
        "  cna reproduce Llama-3.2-1B-Instruct --base Llama-3.2-1B --jbb harmful.csv --benign benign.csv \\\n"
        "      --column Goal --mmlu mmlu/ -o reproduced/",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--base", metavar="BASE", help="its base model, for the layers and the overlap of both")
    parser.add_argument(
        "--as",
        dest="name",
        metavar="NAME",
        help="the paper's model to compare with (default: by the checkpoint's name)",
    )
    parser.add_argument(
        "--jbb",
        metavar="FILE",
        help="harmful prompts of JBB-Behaviors: refusal is measured on them (default: the bundled personal questions)",
    )
    parser.add_argument("--benign", metavar="FILE", help="benign prompts of JBB-Behaviors")
    parser.add_argument(
        "--positive", metavar="FILE", help="discovery prompts to be refused (default: those of --jbb, as published)"
    )
    parser.add_argument(
        "--negative", metavar="FILE", help="discovery prompts to be answered (default: those of --benign)"
    )
    parser.add_argument("--mmlu", metavar="DIR", help="MMLU as distributed, as for cna eval")
    parser.add_argument("--questions", type=positive, metavar="N", help="draw so many questions (default: 1000)")
    parser.add_argument("--shots", type=whole(0, 100), metavar="N", help="examples in front (default: 5)")
    parser.add_argument("--seed", type=seed, metavar="N", help="draws the questions (default: 0)")
    parser.add_argument(
        "--random-draws", type=whole(1, 10_000), default=3, metavar="N", help="random circuits (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=150, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        required=True,
        help="keep finished parts, reproduce.md, reproduce.json, samples.jsonl and the circuits here; the same command "
        "goes on after a crash",
    )
    prompt_flags(parser)
    model_flags(parser, batch_help="answers written together (default: what memory has room for)")
