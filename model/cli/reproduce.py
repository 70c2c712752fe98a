"""What `cna reproduce` does: the paper's tables on a model at hand, from local files."""

from __future__ import annotations

from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.files import check_directory, make_directory

from ..evaluation.multiple_choice import MultipleChoice, read_multiple_choice
from ..evaluation.published import QUESTIONS, named
from ..evaluation.reproduce import Sources, reproduce
from ..evaluation.reproduce_report import left_out, tables
from ..prompts.files import PromptSet, read_prompts
from .arguments import check_column, column_of, engine_of, load_model, say_model
from .console import SIMPLE_HEAD, Table, print_json, stdout
from .evaluation import say_to_stderr

SHOTS = 5  # examples in front of a question


def run_reproduce(args):
    if args.name is not None:
        named(args.name)  # a name that is none is refused before anything is loaded
    sources = _sources(args)
    make_directory(args.output)
    check_directory(args.output)
    model = load_model(args)
    say_model(model, args)
    base = None
    if args.base is not None:  # it only finds a circuit, for which our own engine need not hold all its layers
        base = load_model(args, args.base, stream_layers=engine_of(args, args.base) == "own")
    results = reproduce(
        model, sources, base=base, name=args.name, max_new_tokens=args.max_new_tokens, random_draws=args.random_draws,
        shots=SHOTS if args.shots is None else args.shots,
        batch=None if args.batch in (None, "auto") else args.batch, out=args.output, say=say_to_stderr(args),
    )  # fmt: skip
    if args.json:
        print_json(results)
        return
    first, *others = tables(results)
    head, *rows = first.rows
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=first.title, title_justify="left")
    for title in head:
        table.add_column(title)
    for row in rows:
        table.add_row(*row)
    stdout().print(table)
    stdout().print(f"The model is compared {results['compared']['how']}.", markup=False)
    for line in left_out(results):
        stdout().print(f"left out: {line}", markup=False)
    stdout().print(f"also in reproduce.md: {'; '.join(shown.title for shown in others)}", markup=False)
    names = "reproduce.md, reproduce.json, samples.jsonl and the circuits"
    stdout().print(f"wrote {names} to {Path(args.output)}/", markup=False)


def _sources(args) -> Sources:
    """The prompts and questions that the flags name, or the bundled prompts."""
    check_column(args.column, args.jbb, args.benign, args.positive, args.negative)
    for one, other in (("jbb", "benign"), ("positive", "negative")):
        for given, missing in ((one, other), (other, one)):
            if getattr(args, given) is not None and getattr(args, missing) is None:
                raise InputError(f"--{given}", f"needs --{missing}, the other side")
    if args.jbb is None:
        for flag, value in (("--positive", args.positive), ("--limit", args.limit)):
            if value is not None:
                raise InputError(flag, "goes with --jbb and --benign, which are not given")
    questions = _questions(args)
    chat = False if args.no_template else None
    if args.jbb is None:
        return Sources.personal_questions(chat=chat, multiple_choice=questions)
    harmful, benign = _prompts(args, args.jbb), _prompts(args, args.benign)
    positive, negative = harmful, benign
    if args.positive is not None:
        positive, negative = _prompts(args, args.positive), _prompts(args, args.negative)
    return Sources(harmful, positive, negative, benign, questions, chat)


def _prompts(args, path) -> PromptSet:
    return read_prompts(path, column=column_of(args, path), limit=args.limit)


def _questions(args) -> MultipleChoice | None:
    if args.mmlu is None:
        for flag, value in (("--questions", args.questions), ("--shots", args.shots), ("--seed", args.seed)):
            if value is not None:
                raise InputError(flag, "is for --mmlu, which is not given")
        return None
    return read_multiple_choice(
        args.mmlu, limit=QUESTIONS if args.questions is None else args.questions, seed=args.seed or 0,
        shots=SHOTS if args.shots is None else args.shots,
    )  # fmt: skip
