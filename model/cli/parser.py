"""The command line. Parsing only: a command's module is imported on use, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

import cna_kernels
from cna_kernels.errors import InputError, one_line

# Where run_COMMAND is.
MODULES = dict(demo="demo", show="show", run="run", export="export", doctor="doctor", status="status")
MODULES |= dict.fromkeys(("discover", "estimate"), "attribution")
MODULES |= dict.fromkeys(("eval", "sweep", "compare", "lm-eval"), "evaluation")
DTYPES = ["bfloat16", "float16", "float32"]
MODEL_HELP = "checkpoint directory in Hugging Face layout; demo:instruct or demo:base for the bundled pair"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def build_parser() -> Parser:
    parser = Parser(prog="cna", description="Find and steer the MLP neurons behind a behaviour of a language model.")
    parser.add_argument("--version", action="version", version=f"cna {cna_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "the whole story on the bundled models", "cna demo --out demo-out")
    demo.add_argument("--out", metavar="DIR", default="demo-out", help="for report and pictures (default: %(default)s)")

    discover = _command(
        commands,
        "discover",
        "find a circuit from two prompt files",
        "cna discover path/to/model --positive refused.txt --negative answered.txt -o circuit.json\n"
        "  cna discover path/to/model --positive jbb.csv --negative other.jsonl --column Goal --top-k 200 -o c.json\n"
        "  cna discover path/to/model --contrasts behaviours.jsonl --bootstrap 100 -o circuits/",
    )
    discover.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    discover.add_argument("--positive", metavar="FILE", help="prompts that show the behaviour")
    discover.add_argument("--negative", metavar="FILE", help="prompts that do not")
    discover.add_argument(
        "--contrasts",
        metavar="FILE",
        help='many behaviours at once, lines of {"prompt": TEXT, "columns": ["NAME.positive"]} or {NAME: WEIGHT}',
    )
    discover.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        required=True,
        help="the circuit file to write; with --contrasts a directory for one file each and columns.safetensors",
    )
    size = discover.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=float, metavar="X", help="share of all neurons to keep (default: 0.001)")
    size.add_argument("--top-k", type=int, metavar="K", help="number of neurons to keep instead")
    discover.add_argument(
        "--score", choices=["abs-delta", "magnitude", "cohen-d"], help="what to rank by (default: abs-delta)"
    )
    universal = discover.add_mutually_exclusive_group()
    universal.add_argument(
        "--universal-prompts",
        metavar="FILE",
        help="diverse prompts for the universal filter (default: 24 built-in ones)",
    )
    universal.add_argument(
        "--universal-contrasts", metavar="FILE", help="diverse contrasts for the universal filter instead"
    )
    universal.add_argument("--no-universal", action="store_true", help="turn the universal filter off")
    discover.add_argument("--skip-layers", metavar="L,L", help="layers whose neurons are not candidates")
    discover.add_argument(
        "--preset", choices=["paper", "ref-code"], help="paper (default), or what the authors' public code does"
    )
    discover.add_argument(
        "--position",
        choices=["last", "all", "answer"],
        help="which tokens count: the prompt's last (default), all of it but the BOS, or those of its answer",
    )
    discover.add_argument(
        "--bootstrap",
        type=_positive,
        metavar="R",
        help="say how often each neuron is selected when the prompts are drawn again R times, in the same pass",
    )
    discover.add_argument("--folds", type=_positive, metavar="F", help="cross-validate over F parts of the prompts")
    discover.add_argument("--seed", type=int, metavar="N", help="seed of the bootstrap (default: 0)")
    discover.add_argument(
        "--skip-bad", action="store_true", help="leave out lines that are no prompt, and prompts that are too long"
    )
    discover.add_argument(
        "--run-dir",
        metavar="DIR",
        help="keep finished work here: the same command goes on after a crash; the workers of torchrun or --ray share "
        "the work, two commands at once both do all of it",
    )
    discover.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run the units of --run-dir on Ray: local for one of this machine and this command, or HOST:PORT",
    )
    discover.add_argument(
        "--workers", type=_positive, metavar="N", help="with --ray: how many, each with the model (default: one a GPU)"
    )
    discover.add_argument("--unit", type=_positive, metavar="N", help="prompts of a unit of work (default: 1024)")
    discover.add_argument(
        "--stream-layers",
        action="store_true",
        help="read the model layer by layer: memory for two layers and the prompts' hidden states is enough",
    )
    discover.add_argument(
        "--spill",
        metavar="DIR",
        help="where hidden states go that memory does not hold (default: --run-dir, or TMPDIR)",
    )
    discover.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="share the model among torchrun's workers, one GPU each, instead of the prompts",
    )
    discover.add_argument("--threads", type=_positive, metavar="N", help="threads on a CPU (default: PyTorch's)")
    discover.add_argument("--log-json", action="store_true", help="progress as JSON lines on stderr")
    _prompt_flags(discover)
    _model_flags(discover)
    discover.add_argument(
        "--batch-tokens", type=_positive, metavar="N", help="tokens a forward pass (default: 512, or 32768 on CUDA)"
    )

    estimate = _command(
        commands,
        "estimate",
        "what a discovery will need: memory, reads and time, before anything runs",
        "cna estimate path/to/model --prompts all.txt --stream-layers",
    )
    estimate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    estimate.add_argument("--prompts", metavar="FILE", required=True, help="all prompts of the discovery")
    estimate.add_argument("--columns", type=_positive, default=2, metavar="C", help="sums to keep (default: 2)")
    estimate.add_argument("--stream-layers", action="store_true", help="as for cna discover")
    estimate.add_argument("--batch-tokens", type=_positive, metavar="N", help="as for cna discover")
    _prompt_flags(estimate)
    _device_flags(estimate)
    estimate.add_argument("--json", action="store_true", help="print JSON")

    status = _command(commands, "status", "how far a run directory is", "cna status run/")
    status.add_argument("run", metavar="DIR", help="the directory given to cna discover --run-dir")
    status.add_argument("--json", action="store_true", help="print JSON")

    show = _command(commands, "show", "print a circuit file", "cna show circuit.json")
    show.add_argument("circuit", metavar="CIRCUIT", help="circuit file")
    show.add_argument("--json", action="store_true", help="print JSON")

    run = _command(
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
    _prompt_flags(run)
    _model_flags(run)

    export = _command(
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
    export.add_argument("--max-rank", type=_positive, metavar="R", help="lora: the largest rank the engine takes")
    export.add_argument("--split", action="store_true", help="lora: several adapters where --max-rank is too small")
    export.add_argument(
        "--uniform-rank", action="store_true", help="lora: the same rank in every layer, padded with zeros"
    )
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="lora: of the adapter (default: float32)")
    export.add_argument(
        "--any-model", action="store_true", help="accept a circuit found in another checkpoint of the same shape"
    )

    for name in ("eval", "sweep"):
        _evaluation(commands, name)

    compare = _command(
        commands,
        "compare",
        "find the same behaviour's circuit in two models, compare them, and steer both with both",
        "cna compare base/ instruct/ --positive refused.txt --negative answered.txt --harmful harmful.txt \\\n"
        "      --no-template -o compared/",
    )
    compare.add_argument("models", nargs=2, metavar="MODEL", help=MODEL_HELP)
    compare.add_argument("--positive", metavar="FILE", required=True, help="prompts that show the behaviour")
    compare.add_argument("--negative", metavar="FILE", required=True, help="prompts that do not")
    compare.add_argument("--fraction", type=float, metavar="X", help="as for cna discover")
    compare.add_argument("--score", choices=["abs-delta", "magnitude", "cohen-d"], help="as for cna discover")
    compare.add_argument("--universal-prompts", metavar="FILE", help="as for cna discover")
    _evaluation_flags(compare, needs_output=True)

    _command(
        commands,
        "lm-eval",
        "EleutherAI's lm-evaluation-harness with the model type cna; its own flags follow",
        "cna lm-eval --model cna --model_args pretrained=path/to/model,circuit=circuit.json,multiplier=0 --tasks mmlu",
    )

    doctor = _command(commands, "doctor", "what is live here: backends, devices, versions", "cna doctor --json")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _evaluation(commands, name):
    """The flags of cna eval; cna sweep has those that need no more than two prompt files."""
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
    parser = _command(commands, name, summary, examples)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("-c", "--circuit", metavar="FILE", required=True, help="circuit file")
    parser.add_argument(
        "--any-model", action="store_true", help="accept a circuit found in another checkpoint of the same shape"
    )
    if whole:
        _rivals(parser)
    _evaluation_flags(parser, needs_output=whole)


def _evaluation_flags(parser, *, needs_output):
    """What every evaluation takes."""
    parser.add_argument(
        "--m", "-m", dest="multipliers", metavar="M,M", default="1,0.75,0.5,0.25,0,2", help="default: %(default)s"
    )
    parser.add_argument("--harmful", metavar="FILE", help="prompts to be refused")
    parser.add_argument("--benign", metavar="FILE", help="prompts to be answered")
    parser.add_argument(
        "--refusals", metavar="FILE", help="phrases that mark a refusal, one a line, instead of the bundled broad list"
    )
    parser.add_argument("--strict-refusals", metavar="FILE", help="the same, instead of the bundled strict list")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=100, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="keep finished parts, results.json, samples.jsonl, report.md and pictures here; the same command goes on "
        "after a crash",
        required=needs_output,
    )
    _prompt_flags(parser)
    _model_flags(parser, batch="answers written together (default: what memory has room for)")


def _rivals(parser):
    """The flags of cna eval alone."""
    parser.add_argument("--positive", metavar="FILE", help="discovery prompts, for the baselines")
    parser.add_argument("--negative", metavar="FILE", help="discovery prompts, for the baselines")
    parser.add_argument(
        "--methods",
        metavar="A,B",
        default=None,
        help="of circuit, random, activation, neuron, caa, caa-released, ablation, sae; or all "
        "(default: circuit,random)",
    )
    parser.add_argument("--random-draws", type=_positive, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--sae", metavar="FILE", help="a sparse autoencoder's safetensors file with W_dec")
    parser.add_argument("--sae-feature", type=int, metavar="N", help="the row of W_dec")
    parser.add_argument("--sae-layer", type=int, metavar="L", help="the layer whose output it was trained on")
    parser.add_argument(
        "--neutral", metavar="FILE", help="texts for the KL of the next token (default: 24 built-in ones)"
    )
    parser.add_argument("--no-kl", action="store_true", help="leave the KL out")
    parser.add_argument("--text", metavar="FILE", help="a text file for the perplexity")
    parser.add_argument(
        "--mmlu", metavar="PATH", help="multiple-choice questions: a CSV or parquet file, or a directory"
    )
    parser.add_argument("--subjects", metavar="A,B", help="keep these subjects only")
    parser.add_argument("--mmlu-limit", type=_positive, metavar="N", help="draw so many questions")
    parser.add_argument("--shots", type=int, default=5, metavar="N", help="examples in front (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the questions (default: 0)")
    parser.add_argument("--alternatives", action="store_true", help="compare other discovery scores of the same size")
    parser.add_argument("--curves", action="store_true", help="compare them at seven sizes: necessity and sufficiency")
    parser.add_argument(
        "--judge-command",
        metavar="COMMAND",
        help='a program that reads lines of {"id", "set", "prompt", "answer"} and writes lines of {"id", "score"}',
    )


def _command(commands, name, summary, examples):
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _prompt_flags(parser):
    parser.add_argument("--column", metavar="NAME", help="the prompt's field in .jsonl, .csv and .json files")
    parser.add_argument("--limit", type=_positive, metavar="N", help="use the first N prompts of each file")
    parser.add_argument(
        "--no-template", action="store_true", help="plain text instead of the checkpoint's chat template"
    )


BATCH_HELP = "prompts a forward pass (default: by tokens), or auto, which measures once and says what it chose"


def _model_flags(parser, *, batch=BATCH_HELP):
    _device_flags(parser)
    parser.add_argument("--batch", type=_batch, default=None, metavar="N", help=batch)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _device_flags(parser):
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _batch(text):
    return text if text == "auto" else _positive(text)


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0, 2 for input that cannot be used (one line on stderr), or 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    own = words[:1] if words[:1] == ["lm-eval"] else words  # the harness parses what follows
    args = build_parser().parse_args(_with_signs(own))
    args.words = words[1:]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal's encoding lacks
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
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # files name themselves in an InputError; what is left is mostly stdout, full or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"cna {args.command}: {error.filename or 'stdout'}: {error.strerror or error}", file=sys.stderr)
        return 2


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
