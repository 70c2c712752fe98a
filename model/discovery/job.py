"""Job: a model, a corpus and settings. A job runs units of the corpus and turns their merged sums into circuits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cna_kernels import backends, plans
from cna_kernels.circuit import Circuit
from cna_kernels.cpu import library
from cna_kernels.errors import InputError, one_line
from cna_kernels.select import versions

from ..engines import engine_facts, require_own
from ..evaluation.relp import first_tokens, relevance
from ..memory import memory_of
from ..prompts.columns import Columns
from ..prompts.corpus import UNIVERSAL, Contrast, Corpus
from .circuits import Totals, check_counts, find_universal, select_circuit, selection_of
from .collect import measure_tokens
from .packing import TokenPrompt
from .parts import check_parts, write_part
from .ranks import Ranks
from .run_directory import RunDirectory
from .sense import check_differs, notes_on
from .settings import POSITION_TEXT, Settings
from .units import Part, Pass, encode_ahead, run_unit
from .weights import down_norms

if TYPE_CHECKING:
    from ..language_model import LanguageModel

Progress = Callable[[int, int, int], None]  # prompts done, prompts in all, tokens done


class Job:
    """What one run asks. The constructor checks everything before any forward pass.

    Attributes:
        how: the Pass: what the bits of the sums depend on besides model and prompts.
        notes: what a user should hear about the prompts, a line each.
    """

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        contrasts: Sequence[Contrast],
        settings: Settings,
        *,
        diverse: Sequence[Contrast] = (),
        chat: bool | None = None,
        batch: int | None = None,
        max_tokens: int | None = None,
        squares: bool = False,
    ):
        """
        Args:
            corpus, contrasts: the prompts, and the pairs of the corpus's columns to find circuits for.
            diverse: contrasts for the universal filter, beside the corpus's universal prompts.
            chat: whether prompts go through the chat template; None: where the checkpoint has one.
            batch, max_tokens: prompts, or tokens, of a forward pass; see ``collect.collect``.
            squares: keep sums of squares even where the score needs none, for variances; see ``units.save_columns``.
        """
        self.model, self.corpus, self.contrasts, self.settings = model, corpus, tuple(contrasts), settings
        self.diverse, self.chat = tuple(diverse), chat
        selection_of(settings, model.config.widths)  # raises InputError where too few neurons are left
        check_counts(settings, self.contrasts, corpus.count, corpus.weight)
        if settings.score == "relp":
            check_gradients(model, self.contrasts)
        self.notes = notes_on(corpus, self.contrasts)
        columns = Columns(
            len(corpus.columns), self.contrasts, folds=settings.folds, bootstrap=settings.bootstrap, seed=settings.seed
        )
        by_spread = settings.score == "cohen-d"
        self.how = Pass(columns, squares or by_spread, by_spread, batch, max_tokens)
        self._check_memory(columns)
        model.identity()  # before hours of work: files that have changed meanwhile are refused

    def _check_memory(self, columns: Columns):
        """Refuse more sums than memory holds: the totals of all slots, and the buffers of a unit with all slots."""
        n_slots = columns.n_columns + sum(len(columns.derived(column)) for column in range(columns.n_columns))
        n_layers, n_neurons = self.shape
        needed = n_layers * n_neurons * n_slots * (8 + (2 * (8 + 8) if self.how.squares else 8 + 4))
        available = memory_of("cpu")
        if available is not None and needed > available:
            what = f"{n_slots} sums of {n_layers} x {n_neurons} neurons need {needed / 2**30:.1f} GiB"
            raise InputError("columns, bootstrap, folds", f"{what}, there are {available / 2**30:.1f}")

    @property
    def shape(self) -> tuple[int, int]:
        """(number of layers, neurons of each layer)."""
        return self.model.config.num_hidden_layers, self.model.config.intermediate_size

    def choose_batch(self) -> tuple[int, dict[int, float]]:
        """Measure how many tokens a forward pass should have, and use that size; see ``collect.measure_tokens``."""
        entries = self.corpus.read(0)[:256]
        n_columns = self.how.columns.weights(entries, 0)[1].shape[1] + sum(entry.universal for entry in entries)
        longest = self.model.config.context_length
        prompts = [prompt for prompt in self._encode(entries) if 0 < len(prompt.ids) <= longest]
        if not prompts:
            raise InputError("batch", f"none of the first {len(entries)} prompts fits the model's context")
        size, rates = measure_tokens(self.model.transformer, prompts, n_columns, squares=self.how.squares)
        self.how = replace(self.how, batch=None, max_tokens=size)
        return size, rates

    def run(
        self, units: Sequence[int], *, skip_bad: bool = False, progress: Progress | None = None, done: int = 0
    ) -> Generator[tuple[int, Part], None, None]:
        """Run units of the corpus, given by number. Yield each unit's number and its part.

        Args:
            done: prompts that are done already, for ``progress``.
        """
        counts, total = [done, 0], done + sum(self.corpus.units[unit].n_prompts for unit in units)

        def advance(prompts: int, tokens: int) -> None:
            counts[0] += prompts
            counts[1] += tokens
            if progress is not None:
                progress(counts[0], total, counts[1])

        if progress is not None:
            progress(done, total, 0)
        entries = ((self.corpus.units[unit].first, self.corpus.read(unit)) for unit in units)
        ahead = encode_ahead(entries, partial(self._encode, keep_long=skip_bad))
        for unit, (first, batch, prompts) in zip(units, ahead, strict=True):
            part = run_unit(
                self.model.transformer,
                batch,
                prompts,
                first,
                self.how,
                skip_bad=skip_bad,
                progress=advance,
            )
            yield unit, part
            del part

    def run_all(self, **options) -> Part:
        """Run the whole corpus in this process and add up its parts. Options are those of :meth:`run`."""
        total = None
        for _, part in self.run(range(len(self.corpus.units)), **options):
            if total is None:
                total = part  # to add it to an empty part would copy it
            else:
                total += part
            del part  # or it would be held while the next unit runs
        return Part() if total is None else total

    def start(self, directory) -> RunDirectory:
        """Start this job's run in a directory, or join it. Raises InputError if the directory holds another run."""
        run = RunDirectory.start(directory, self.facts(), self.corpus)
        check_parts(run)
        return run

    def run_in(self, directory, *, ranks: Ranks | None = None, **options) -> RunDirectory:
        """Run the missing units of a run directory, or this rank's share of them. Rank 0 returns when all are done.

        Options are those of :meth:`run`.
        """
        run = self.start(directory)
        with says_what_is_kept(run):
            missing = run.missing()
            done = self.corpus.n_prompts - sum(run.units[unit].n_prompts for unit in missing)
            share = missing if ranks is None else ranks.share(missing)
            with contextlib.closing(self.run(share, done=done, **options)) as units:
                for unit, part in units:
                    write_part(run, unit, part)
            if ranks is not None:
                ranks.wait()
        return run

    def facts(self) -> dict:
        """What the sums depend on besides the prompts, for the run's manifest."""
        model, settings, how = self.model, self.settings, self.how
        return {
            "model": model.identity(),
            "tokenizer_sha256": model.tokenizer.sha256,
            "chat_template_sha256": self._template_sha256(),
            "chat": model.encoder.record(self.chat),
            "shape": list(self.shape),
            "dtype": self._dtype(),
            **engine_facts(model),
            "device": model.device.type,
            "backend": backends.name_for(model.device),
            # PyTorch's attention on CPUs rounds differently with another number of threads.
            "isa": library.isa() if backends.name_for(model.device) == "cpu" else None,
            "gpu": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
            "CNA_PLAN": ",".join(f"{op}={name}" for op, name in sorted(plans.asked().items())) or None,
            "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
            "position": settings.position,
            "double_bos": settings.double_bos,
            "universal": settings.universal,
            "contrasts": [list(contrast) for contrast in (*self.contrasts, *self.diverse)],
            "folds": settings.folds,
            "bootstrap": settings.bootstrap,
            "seed": settings.seed if settings.bootstrap else None,
            "squares": [how.squares, how.derived_squares],
            "sums": "fp64" if how.squares else "fp32",  # what a forward pass adds to
            "batch": how.batch,
            "batch_tokens": how.max_tokens,
            "versions": versions(),
        }

    def _dtype(self) -> str:
        return str(self.model.transformer.dtype).removeprefix("torch.")

    def _template_sha256(self) -> str | None:
        return self.model.tokenizer.template_sha256 if self.model.encoder.uses_chat(self.chat) else None

    def _encode(self, entries, keep_long=True):
        settings = self.settings
        return self.model.encoder.encode_entries(
            entries,
            position=settings.position,
            chat=self.chat,
            double_bos=settings.double_bos,
            keep_long=keep_long,
        )

    def _relevance(self) -> Tensor:
        """The neurons' relevance for the tokens that begin the positive prompts' answers and not the negative ones'."""
        transformer, longest = self.model.transformer, self.model.config.context_length
        sides: list[list[TokenPrompt]] = [[], []]
        for unit in range(len(self.corpus.units)):
            entries = self.corpus.read(unit)
            for entry, prompt in zip(entries, self._encode(entries), strict=True):
                columns = {column for column, *_ in entry.columns}
                for side, column in zip(sides, self.contrasts[0][1:], strict=True):
                    if column in columns and 0 < len(prompt.ids) <= longest:
                        side.append(prompt)
        return relevance(transformer, sides[0], *first_tokens(transformer, *sides))

    def circuits(self, totals: Totals) -> dict[str, Circuit]:
        """Select the circuit of every contrast, with its provenance."""
        model, settings, corpus = self.model, self.settings, self.corpus
        counts = {key: n - totals.n_left_out.get(int(key), 0) for key, n in corpus.count.items() if key != UNIVERSAL}
        weights = {key: totals.slot(int(key)).count for key in counts}
        check_counts(settings, self.contrasts, counts, weights)
        universal = None
        if settings.universal:
            prompts_sha256 = corpus.digests.get(UNIVERSAL, corpus.sha256)
            widths = model.config.widths
            universal = find_universal(totals, self.diverse, settings.universal_threshold, widths, prompts_sha256)
        norms = down_norms(model) if settings.score == "norm-weighted" else None
        ranking = self._relevance() if settings.score == "relp" else None
        selection = selection_of(
            settings, model.config.widths, universal, model.transformer.dtype, norms=norms, ranking=ranking
        )
        shared = dict(
            model=model.identity(),
            tokenizer_sha256=model.tokenizer.sha256,
            chat_template_sha256=self._template_sha256(),
            chat=model.encoder.record(self.chat),
            dtype=self._dtype(),
            position=POSITION_TEXT[settings.position],
            preset=settings.preset,
            experts=model.config.experts,
        )
        found = {}
        for contrast in self.contrasts:
            sides = zip(("positive", "negative"), contrast[1:], strict=True)
            prompts = {
                side: {"count": counts[str(column)], "sha256": corpus.digests[str(column)]} for side, column in sides
            }
            circuit = select_circuit(totals, self.how.columns, contrast, selection, prompts=prompts, **shared)
            check_differs(
                circuit, contrast.name, [totals.slot(column) for column in contrast[1:]], model.transformer.dtype
            )
            found[contrast.name] = circuit
        return found


def check_gradients(model: LanguageModel, contrasts: Sequence[Contrast]) -> None:
    """Raise InputError where the score relp, which needs gradients, cannot be computed."""
    require_own(model.transformer, "the score relp needs gradients")
    if len(contrasts) != 1:
        raise InputError(
            "score", f"relp needs gradients, which are taken for one contrast, and there are {len(contrasts)}"
        )


@contextlib.contextmanager
def says_what_is_kept(run: RunDirectory) -> Iterator[None]:
    """When an interrupt or bad input ends the work on a run, say on stderr how many of its units are done."""
    try:
        yield
    except (KeyboardInterrupt, InputError) as error:
        what = f"{len(run.units) - len(run.missing())} of {len(run.units)} units are done and kept in {run.path}"
        goes_on = "; the same command goes on from there" if isinstance(error, KeyboardInterrupt) else ""
        print(one_line(what + goes_on), file=sys.stderr)
        raise
