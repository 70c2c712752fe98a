"""What `cna eval`, `cna sweep`, `cna compare` and `cna lm-eval` do."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cna_kernels.errors import InputError, one_line
from cna_kernels.files import check_directory, make_directory, read_text

from ..evaluation import compare, evaluate, report
from ..evaluation.behaviour import Behaviour, is_name
from ..evaluation.metrics import Refusals
from ..evaluation.multiple_choice import read_multiple_choice
from ..evaluation.suite import METHODS, Suite, check_labels, check_name
from ..packages import require
from ..prompts.files import PromptSet, neutral_texts, read_prompts
from .arguments import check_column, column_of, load_circuit, load_model, multipliers_of, say_model
from .console import SIMPLE_HEAD, Table, print_json, stdout

COLUMNS = 5  # of one table, beside method and m: what 80 characters hold


def run_eval(args):
    if len(args.circuit) > 1:
        raise InputError(
            "--circuit", f"cna {args.command} takes one circuit; cna export writes several into one checkpoint"
        )
    suite = _suite(args)
    controls = _controls(args)
    if args.output:
        require("tokenizers", "jinja2", "matplotlib")  # said now, because the pictures come last
        make_directory(args.output)
        check_directory(args.output)
    model = load_model(args)
    how = dict(any_model=args.any_model, sign=args.sign, chat=suite.chat_of("measured"))
    circuit = load_circuit(args.circuit[0], model, **how)
    others = {name: load_circuit(path, model, **how) for name, path in controls.items()}
    suite = replace(suite, others=others)
    say_model(model, args)
    results = evaluate.evaluate(model, circuit, suite, out=args.output, say=say_to_stderr(args))
    if args.output:
        report.write(results, args.output)
    if args.json:
        print_json(results)
        return
    _show(results)
    if args.output:
        names = "results.json, samples.jsonl, report.md and pictures"
        stdout().print(f"wrote {names} to {Path(args.output)}/", markup=False)


run_sweep = run_eval  # cna sweep has a few of the flags of cna eval


def run_compare(args):
    require("tokenizers", "jinja2", "matplotlib")
    suite = _suite(args)
    settings = {"fraction": args.fraction, "score": args.score}
    if args.universal_prompts:
        column = column_of(args, args.universal_prompts)
        settings["universal_prompts"] = read_prompts(args.universal_prompts, column=column)
    make_directory(args.output)
    check_directory(args.output)
    models = {}
    for path in args.models:
        model = load_model(args, path)
        name = model.source.short
        if name in models:
            name += " (second)"
        models[name] = model
        say_model(models[name], args)
    results = compare.compare(models, suite, out=args.output, say=say_to_stderr(args), **settings)
    for name, evaluation in results["evaluations"].items():
        report.write(evaluation, Path(args.output) / name)
    if args.json:
        print_json(results)
        return
    alike = ", ".join(f"{name} {value:.3g}" for name, value in (results["alike"] or {}).items())
    stdout().print(alike or "the models have different shapes: their neurons cannot be matched", markup=False)
    for name, found in results["circuits"].items():
        where = ", ".join(
            f"{100 * found[place]:.0f}% in the {place}" for place in ("last three layers", "last quarter")
        )
        stdout().print(f"\n{name}: {found['k']} neurons, {where}", markup=False)
        _show(results["evaluations"][name])
    names = "compare.json, compare.md, circuits and both evaluations"
    stdout().print(f"wrote {names} to {Path(args.output)}/", markup=False)


def run_lm_eval(args):
    require("tokenizers", "jinja2", "lm_eval")
    from lm_eval.__main__ import cli_evaluate

    from ..evaluation.lm_eval_model import register

    register(getattr(args, "lead", None))
    sys.argv = ["cna lm-eval", *args.words]
    try:
        cli_evaluate()
    except InputError:
        raise
    except ValueError as error:  # as the harness says what it does not take
        raise InputError("lm-eval", str(error)) from None


def say_to_stderr(args):
    """Return a function that prints a line of progress on stderr."""
    return lambda text: print(f"cna {args.command}: {one_line(text)}", file=sys.stderr, flush=True)


def _suite(args) -> Suite:
    """The suite that the flags ask for. What only flags of cna eval can set has its default in the other commands."""
    behaviour = _behaviour(args) if args.command == "eval" else None
    files = {name: getattr(args, name, None) for name in ("harmful", "benign", "positive", "negative", "neutral")}
    check_column(args.column, *files.values())
    sets: dict[str, PromptSet] = {
        name: read_prompts(path, column=column_of(args, path), limit=args.limit)
        for name, path in files.items() if path
    }  # fmt: skip
    if args.command == "eval" and not args.no_kl:
        sets.setdefault("neutral", neutral_texts())
    refusals = {"broad": Refusals.bundled("broad"), "strict": Refusals.bundled("strict")}
    for name, path in (("broad", args.refusals), ("strict", args.strict_refusals)):
        if path:
            refusals[name] = Refusals.read(path)
    options: dict[str, Any] = {**sets}
    if args.labels is not None:
        labels = tuple(name.strip() for name in args.labels.split(","))
        check_labels(labels, "--labels")
        if not (args.harmful or args.benign):
            raise InputError("--labels", "is for --harmful and --benign, which are not given")
        options["labels"] = labels
    if args.command == "eval":
        options |= dict(
            methods=_methods(args),
            text=read_text(args.text) if args.text else None,
            stride=_stride(args),
            multiple_choice=_multiple_choice(args),
            shots=args.shots,
            random_draws=args.random_draws,
            sae=_sae(args),
            alternatives=args.alternatives,
            curves=args.curves,
            judge_command=args.judge_command,
            behaviour=behaviour,
        )
    return Suite(
        multipliers=tuple(dict.fromkeys(multipliers_of(args.multipliers, "--m"))),
        refusals=refusals,
        max_new_tokens=args.max_new_tokens,
        chat=False if args.no_template else None,
        batch=None if args.batch in (None, "auto") else args.batch,
        **options,
    )


def _controls(args) -> dict[str, str]:
    """The circuit files of --control by name: NAME=FILE, or FILE, whose name without its suffix is taken."""
    found: dict[str, str] = {}
    for words in getattr(args, "control", ()):
        name, equals, path = words.partition("=")
        if not (equals and is_name(name)) or Path(words).exists():
            name, path = Path(words).stem, words
        if name in found:
            raise InputError("--control", f"two are called {name!r}: give one another name, NAME=FILE")
        check_name(name, "--control")
        found[name] = path
    return found


def _behaviour(args) -> Behaviour | None:
    if args.behaviour is None:
        return None
    for flag in ("harmful", "positive", "negative", "labels"):
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag}", "is not for --behaviour, which has its own")
    if args.limit is not None and not (args.benign or args.neutral):
        raise InputError("--limit", "is for prompt files, and a behaviour's prompts are used whole")
    return Behaviour.named(args.behaviour)


def _methods(args) -> tuple[str, ...]:
    if args.methods is None:
        return ("circuit", "random")
    if args.methods == "all":
        return tuple(name for name in METHODS if name != "sae" or args.sae)
    return tuple(dict.fromkeys(name.strip() for name in args.methods.split(",")))


def _stride(args) -> int | None:
    if args.stride is not None and not args.text:
        raise InputError("--stride", "is for --text, which is not given")
    return args.stride


def _multiple_choice(args):
    if not 0 <= args.shots <= 100:
        raise InputError("--shots", f"expected 0 to 100, got {args.shots}")
    if args.mmlu is None:
        for flag, value in (("--subjects", args.subjects), ("--mmlu-limit", args.mmlu_limit)):
            if value:
                raise InputError(flag, "is for --mmlu, which is not given")
        return None
    subjects = [name.strip() for name in args.subjects.split(",")] if args.subjects else None
    return read_multiple_choice(args.mmlu, subjects=subjects, limit=args.mmlu_limit, seed=args.seed, shots=args.shots)


def _sae(args) -> tuple[str, int, int] | None:
    given = [value for value in (args.sae, args.sae_feature, args.sae_layer) if value is not None]
    if given and len(given) < 3:
        raise InputError("--sae", "needs a file, --sae-feature and --sae-layer")
    return (args.sae, args.sae_feature, args.sae_layer) if given else None


def _show(results):
    columns = report.brief(results)
    for start in range(0, len(columns), COLUMNS):
        rows = report.table_rows(results, columns[start : start + COLUMNS])
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for title in next(rows):
            table.add_column(title.replace(" ", "\n"), no_wrap=True)
        for row in rows:
            table.add_row(*row)
        stdout().print(table)
    for line in report.legend(results):
        stdout().print(line, markup=False)
    for pair in results.get("overlap", ()):
        one, other = pair["circuits"]
        shared = f"{pair['shared']} neurons, {pair['own'][0]} are only in the first, {pair['own'][1]} in the second"
        stdout().print(f"{one} and {other} share {shared}", markup=False)
