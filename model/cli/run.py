"""What `cna run` does: every prompt once unsteered and once at each multiplier."""

from __future__ import annotations

from typing import Any

from cna_kernels.errors import InputError

from ..prompts.files import PromptSet, read_prompts
from .arguments import check_column, column_of, load_circuit, load_model, multipliers_of, say_model, together
from .console import Table, cell, print_json, stdout


def run_run(args):
    texts = list(args.prompt or [])
    prompts = PromptSet.of(texts, "--prompt") if texts else None
    if args.prompts:
        check_column(args.column, args.prompts)
        prompts = read_prompts(args.prompts, column=column_of(args, args.prompts), limit=args.limit)
    if prompts is None or (texts and args.prompts):
        raise InputError("prompts", "give either -p TEXT or --prompts FILE")
    multipliers = multipliers_of(args.multiplier, "--multiplier")
    paths = args.circuit or []
    if len(paths) > 1 < len(multipliers):
        what = f"expected one number for all {len(paths)} circuits, got {args.multiplier}"
        raise InputError("--multiplier", f"{what}; cna export gives each circuit its own")
    model = load_model(args)
    chat = False if args.no_template else None
    circuits = [load_circuit(path, model, any_model=args.any_model, sign=args.sign, chat=chat) for path in paths]
    circuit = together(paths, circuits, multipliers[0]) if circuits else None
    # A row for each prompt and column, all in the same batches. A column is None (unsteered) or a multiplier.
    columns = [None] if circuit is None else [None, *multipliers]
    n_prompts = len(prompts)
    rows = PromptSet(prompts.texts * len(columns), prompts.places * len(columns))
    answers = model.generate(
        rows,
        circuit=None if circuit is None else [m if m is None else circuit for m in columns for _ in range(n_prompts)],
        multiplier=0.0 if circuit is None else [m or 0.0 for m in columns for _ in range(n_prompts)],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.sample_top_k,
        top_p=args.top_p,
        seed=[args.seed + number for _ in columns for number in range(n_prompts)],
        chat=chat,
        batch=None if args.batch == "auto" else args.batch,
    )
    say_model(model, args, hashed=circuit is not None)
    results: list[dict[str, Any]] = [
        {
            "prompt": text,
            "answers": [{"multiplier": m, "text": answers[c * n_prompts + n]} for c, m in enumerate(columns)],
        }
        for n, text in enumerate(prompts.texts)
    ]
    if args.json:
        print_json(results)
        return
    table = Table(show_lines=True)
    table.add_column("prompt")
    for m in columns:
        table.add_column("unsteered" if m is None else f"m = {m:g}")
    for result in results:
        table.add_row(*[cell(text) for text in (result["prompt"], *(a["text"] for a in result["answers"]))])
    stdout().print(table)
