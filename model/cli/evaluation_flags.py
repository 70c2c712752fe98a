"""The flags of cna eval, sweep, compare, matrix and lm-eval. ``evaluation.py`` loads torch, this module does not."""

from __future__ import annotations

from .flags import (
    MODEL_HELP,
    circuit_flags,
    command,
    count,
    model_flags,
    positive,
    prompt_flags,
    seed,
    sign_flag,
    template_arg,
    whole,
)


def add(commands) -> None:
    """Add the commands eval, sweep, compare, matrix and lm-eval."""
    for name in ("eval", "sweep"):
        _evaluation(commands, name)
    _compare(commands)
    _matrix(commands)
    command(
        commands,
        "lm-eval",
        "EleutherAI's lm-evaluation-harness with the model type cna; its own flags follow, and --tensor-parallel",
        "cna lm-eval --model cna --model_args pretrained=path/to/model,circuit=circuit.json,multiplier=0 --tasks mmlu",
    )


def _evaluation(commands, name):
    """Add cna eval or cna sweep. cna sweep has only the flags that need no more than two prompt files."""
    whole = name == "eval"
    if whole:
        summary = "refusal, quality, likelihood and multiple choice at several strengths, beside controls and baselines"
        examples = (
            "cna eval path/to/model -c circuit.json --harmful harmful.csv --benign benign.csv --column Goal \\\n"
            "      --positive refused.txt --negative answered.txt --mmlu mmlu/ --methods all -o results/"
        )
    else:
        summary = "refusal and quality of one circuit at several strengths"
        examples = "cna sweep path/to/model -c circuit.json --m 1,0.75,0.5,0.25,0 --harmful harmful.txt"
    parser = command(commands, name, summary, examples)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    circuit_flags(parser, required=True)
    if whole:
        _rivals(parser)
    _evaluation_flags(parser, needs_output=whole)


def _evaluation_flags(parser, *, needs_output):
    """Add the flags that eval, sweep and compare share."""
    parser.add_argument(
        "--m", "-m", dest="multipliers", metavar="M,M", default="1,0.75,0.5,0.25,0,2", help="default: %(default)s"
    )
    parser.add_argument("--harmful", metavar="FILE", help="prompts to be refused")
    parser.add_argument("--benign", metavar="FILE", help="prompts to be answered")
    parser.add_argument("--labels", metavar="A,B", help="what tables and pictures call them (default: harmful,benign)")
    parser.add_argument(
        "--refusals", metavar="FILE", help="phrases that mark a refusal, one a line, instead of the bundled broad list"
    )
    parser.add_argument("--strict-refusals", metavar="FILE", help="the same, instead of the bundled strict list")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=100, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="keep finished parts, results.json, samples.jsonl, report.md and pictures here; the same command goes on "
        "after a crash",
        required=needs_output,
    )
    prompt_flags(parser)
    model_flags(parser, batch_help="answers written together (default: what memory has room for)")


def _rivals(parser):
    """Add the flags that only cna eval has."""
    parser.add_argument(
        "--behaviour",
        metavar="NAME",
        help="a behaviour to measure instead of refusals of --harmful: refusal, capitals, agreement, json or french, "
        "or a file",
    )
    parser.add_argument("--positive", metavar="FILE", help="discovery prompts, for the baselines")
    parser.add_argument("--negative", metavar="FILE", help="discovery prompts, for the baselines")
    parser.add_argument(
        "--methods",
        metavar="A,B",
        default=None,
        help="of circuit, random, activation, neuron, caa, caa-released, ablation, sae; or all "
        "(default: circuit,random)",
    )
    parser.add_argument(
        "--control",
        action="append",
        metavar="NAME=FILE",
        default=[],
        help="a further circuit, evaluated beside the circuit at the same multipliers; FILE alone is called as the "
        "file; may be given again",
    )
    parser.add_argument("--random-draws", type=whole(1, 10_000), default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--sae", metavar="FILE", help="a sparse autoencoder's safetensors file with W_dec")
    parser.add_argument("--sae-feature", type=whole(0, 1 << 40), metavar="N", help="the row of W_dec")
    parser.add_argument(
        "--sae-layer", type=whole(0, 1 << 20), metavar="L", help="the layer whose output it was trained on"
    )
    parser.add_argument(
        "--neutral", metavar="FILE", help="texts for the KL of the next token (default: 24 built-in ones)"
    )
    parser.add_argument("--no-kl", action="store_true", help="leave the KL out")
    parser.add_argument("--text", metavar="FILE", help="a text file for the perplexity")
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens by which the window of 1024 moves over the text: less gives each token more context, and takes "
        "longer (default: windows side by side)",
    )
    parser.add_argument(
        "--mmlu", metavar="PATH", help="multiple-choice questions: a CSV or parquet file, or a directory"
    )
    parser.add_argument("--subjects", metavar="A,B", help="keep these subjects only")
    parser.add_argument("--mmlu-limit", type=positive, metavar="N", help="draw so many questions")
    parser.add_argument("--shots", type=count, default=5, metavar="N", help="examples in front (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="draws the questions (default: 0)")
    parser.add_argument("--alternatives", action="store_true", help="compare other discovery scores of the same size")
    parser.add_argument("--curves", action="store_true", help="compare them at seven sizes: necessity and sufficiency")
    parser.add_argument(
        "--judge-command",
        metavar="COMMAND",
        help='a program that reads lines of {"id", "set", "prompt", "answer"} and writes lines of {"id", "score"}',
    )


def _matrix(commands):
    parser = command(
        commands,
        "matrix",
        "find the circuit of each of several behaviours, and measure every behaviour under every circuit",
        "cna matrix path/to/model --behaviour capitals --behaviour refusal -o matrix/\n"
        "  cna matrix path/to/model --behaviour mine.json -c mine=circuit.json -c other=other.json",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--behaviour",
        action="append",
        metavar="NAME",
        help="refusal, capitals, agreement, json or french, or a file; may be given again (default: all five)",
    )
    parser.add_argument(
        "-c",
        "--circuit",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a further circuit, or that of the behaviour NAME, which is else discovered; may be given again",
    )
    parser.add_argument("--any-model", action="store_true", help="accept circuits found in another checkpoint")
    sign_flag(parser)
    parser.add_argument("--fraction", type=float, metavar="X", help="as for cna discover")
    parser.add_argument("--m", "-m", dest="multipliers", metavar="M,M", default="0,2", help="default: %(default)s")
    parser.add_argument(
        "--random-draws",
        type=whole(0, 10_000),
        default=2,
        metavar="N",
        help="controls of each, at every multiplier (default: %(default)s)",
    )
    parser.add_argument("--harmless", metavar="FILE", help="prompts that a steered model should still answer")
    parser.add_argument("--no-kl", action="store_true", help="leave the KL on neutral text out")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=60, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="keep finished parts, matrix.json, matrix.md and the circuits here"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message of every chat")
    parser.add_argument(
        "--template-arg", metavar="NAME=VALUE", type=template_arg, action="append", default=[],
        help="a variable of the chat template, as enable_thinking=false; may be given again",
    )  # fmt: skip
    parser.set_defaults(no_template=False)
    model_flags(parser, batch_help="answers written together (default: what memory has room for)")


def _compare(commands):
    parser = command(
        commands,
        "compare",
        "find the same behaviour's circuit in two models, compare them, and steer both with both",
        "cna compare base/ instruct/ --positive refused.txt --negative answered.txt --harmful harmful.txt \\\n"
        "      --no-template -o compared/",
    )
    parser.add_argument("models", nargs=2, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--positive", metavar="FILE", required=True, help="prompts that show the behaviour")
    parser.add_argument("--negative", metavar="FILE", required=True, help="prompts that do not")
    parser.add_argument("--fraction", type=float, metavar="X", help="as for cna discover")
    scores = ["abs-delta", "magnitude", "cohen-d", "norm-weighted"]
    parser.add_argument("--score", choices=scores, help="as for cna discover")
    parser.add_argument("--universal-prompts", metavar="FILE", help="as for cna discover")
    _evaluation_flags(parser, needs_output=True)
