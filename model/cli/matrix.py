"""What `cna matrix` does: find the circuit of each behaviour, and measure every behaviour under every circuit."""

from __future__ import annotations

import json
from pathlib import Path

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.files import check_directory, make_directory, sha256, write_text

from ..evaluation.behaviour import BUNDLED, Behaviour, is_name
from ..evaluation.facts import environment, model_facts
from ..evaluation.matrix import matrix
from ..evaluation.matrix_report import markdown, table
from ..evaluation.paired import STAR
from ..evaluation.store import Store
from ..prompts.files import neutral_texts, read_prompts
from .arguments import load_circuit, load_model, multipliers_of, say_model, signed
from .console import SIMPLE_HEAD, Table, print_json, stdout
from .evaluation import say_to_stderr


def run_matrix(args):
    behaviours = [Behaviour.named(name) for name in args.behaviour or BUNDLED]
    multipliers = tuple(dict.fromkeys(multipliers_of(args.multipliers, "--m")))
    if set(multipliers) == {1.0}:
        raise InputError("--m", "expected a multiplier besides 1, which changes nothing")
    harmless = read_prompts(args.harmless) if args.harmless else None
    given: dict[str, str] = {}
    for name, path in map(_named, args.circuit):
        if name in given:
            raise InputError("--circuit", f"names {name!r} twice")
        given[name] = path
    if len({behaviour.name for behaviour in behaviours}) < len(behaviours):
        raise InputError("--behaviour", f"two have one name: {', '.join(each.name for each in behaviours)}")
    if args.fraction is not None and all(behaviour.name in given for behaviour in behaviours):
        raise InputError("--fraction", "is for circuits that are discovered, and every behaviour's is given")
    if args.output:
        make_directory(args.output)
        check_directory(args.output)
    model = load_model(args)
    say = say_to_stderr(args)
    say_model(model, args)
    chat = {behaviour.name: behaviour.chat for behaviour in behaviours}
    circuits = {
        name: load_circuit(path, model, any_model=args.any_model, sign=args.sign, chat=chat.get(name))
        for name, path in given.items()
    }
    for behaviour in behaviours:
        if behaviour.name not in circuits:
            say(f"{behaviour.name}: {len(behaviour.positive)} and {len(behaviour.negative)} prompts")
            circuits[behaviour.name] = signed(_found(model, behaviour, args.fraction), args.sign)
    neutral = None if args.no_kl else neutral_texts()
    facts = {
        **model_facts(model),
        "behaviours": {behaviour.name: behaviour.sha256 for behaviour in behaviours},
        "circuits": [[name, sha256(circuit.to_json())] for name, circuit in circuits.items()],  # their order counts
        "multipliers": list(multipliers),
        "random_draws": args.random_draws,
        "max_new_tokens": args.max_new_tokens,
        "harmless": None if harmless is None else harmless.sha256,
        "kl": None if neutral is None else neutral.sha256,
    }
    with Store(args.output, facts) as store:
        results = matrix(
            model, behaviours, circuits, multipliers=multipliers, random_draws=args.random_draws, harmless=harmless,
            neutral=neutral, max_new_tokens=args.max_new_tokens,
            batch=None if args.batch in (None, "auto") else args.batch, store=store, say=say,
        )  # fmt: skip
    results = {"model": model.identity(), "environment": environment(model), **results}
    if args.output:
        out = Path(args.output)
        for name, circuit in circuits.items():
            circuit.save(out / f"circuit-{name}.json")
        write_text(out / "matrix.json", json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        write_text(out / "matrix.md", markdown(results))
    if args.json:
        print_json(results)
        return
    titles, rows = table(results, short=True)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        shown.add_column(title.replace(" ", "\n", 1))
    for row in rows:
        shown.add_row(*row)
    stdout().print(shown)
    stdout().print(STAR, markup=False)
    if args.output:
        stdout().print(f"wrote matrix.json, matrix.md and the circuits to {Path(args.output)}/", markup=False)


def _named(words: str) -> tuple[str, str]:
    name, equals, path = words.partition("=")
    if not (equals and path and is_name(name)):
        raise InputError("--circuit", f"expected NAME=FILE, NAME of letters, digits, - and _, got {words!r}")
    return name, path


def _found(model, behaviour: Behaviour, fraction: float | None) -> Circuit:
    settings = {} if fraction is None else {"fraction": fraction}
    return model.discover(behaviour.positive, behaviour.negative, chat=behaviour.chat, **settings)
