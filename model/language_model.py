"""LanguageModel: a checkpoint ready to use. Text in, text and circuits out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cna_kernels import backends
from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError, InputWarning
from cna_kernels.files import FilePath
from cna_kernels.renamed import renamed
from cna_kernels.steering import SteeringTable, distinct

from .checkpoint.config import dtype_asked
from .checkpoint.formats import open_checkpoint, require_checkpoint
from .checkpoint.identity import Identity
from .circuit_files import Given, check_circuit, circuits_of
from .discovery.job import Job, Progress
from .discovery.packing import TokenPrompt
from .discovery.settings import Settings, settings_from
from .engines import Chosen, require_own
from .evaluation.relp import relevance
from .generate import Sampling, generate
from .hub.find import find_model
from .memory import usable_device
from .prompts.corpus import Contrast, Corpus, Names, two_sets
from .prompts.files import PromptSet, neutral_prompts
from .summary import described, summary_of
from .text.prompt_encoder import PromptEncoder
from .text.text_stream import TextStream
from .text.tokenizer import Tokenizer, stop_ids
from .transformer import Steering, Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .parallel.lead import Lead

GENERATE_ROWS = 64  # prompts decoded together


def load(
    directory: FilePath,
    *,
    engine: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    stream_layers: bool = False,
    spill: FilePath | None = None,
    mesh: DeviceMesh | Lead | None = None,
    weights: bool = True,
    system: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    device_map: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Load a checkpoint: a directory in Hugging Face layout, a .gguf file, or a name on the Hugging Face Hub, such as
    "org/name@revision"; see ``hub.find.find_model``. The options are as in :class:`LanguageModel`.

    Raises InputError, naming the directory, file or tensor that cannot be used.
    """
    return LanguageModel(
        directory, engine=engine, device=device, dtype=dtype, stream_layers=stream_layers, spill=spill, mesh=mesh,
        weights=weights, system=system, template_args=template_args, device_map=device_map, model_args=model_args,
    )  # fmt: skip


class LanguageModel:
    """A model with its tokenizer. ``model(input_ids[B, S]) -> logits[B, S, V]`` is the plain call.

    Attributes:
        engine: what runs the model, "own" or "transformers".
        transformer: the forward pass: a Transformer, which is a torch module; a StreamedTransformer with
            ``stream_layers``, a LedTransformer or a ParallelTransformer with ``mesh``, an HfTransformer on the engine
            "transformers".
        tokenizer: text to ids and back; encoder: prompts to ids.
        config: ModelConfig.
        directory: where the model was loaded from; checkpoint: the tensors of its files.
    """

    def __init__(
        self,
        directory: FilePath,
        *,
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        stream_layers: bool = False,
        spill: FilePath | None = None,
        mesh: DeviceMesh | Lead | None = None,
        weights: bool = True,
        system: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        device_map: str | None = None,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            engine: "own", our forward pass; "transformers", any model that transformers loads and ``attach`` knows;
                "auto", our own where it serves the model, else transformers, which a warning then says.
            device: "cpu", "cuda:1", ...; None is a GPU where there is one (LOCAL_RANK says which), else the CPU.
            dtype: "bfloat16", "float16" or "float32", or these of torch; None and "auto" keep the checkpoint's own.
            stream_layers: read each layer when its turn comes, for models larger than memory. Such a model finds
                circuits, and nothing else. ``spill`` is a directory for hidden states that memory does not hold.
            mesh: share the model with other processes: a Lead, see ``parallel.lead.run_led``, whose model does all but
                ``relevance``; or a mesh of ``tensor_parallel.open_mesh``, all whose processes load the model and make
                the same calls, and whose model finds circuits, and nothing else.
            weights: False reads none: such a model checks and selects circuits, and nothing else.
            system: the system message of every chat.
            template_args: variables of the chat template, as ``{"enable_thinking": False}``.
            device_map: on transformers, as of its ``from_pretrained``: "auto" shares the layers out among all GPUs.
            model_args: on transformers, further arguments of ``from_pretrained``.
        """
        self.source = find_model(directory)
        self.directory = directory = self.source.path
        require_checkpoint(directory)
        options: dict[str, Any] = dict(dtype=dtype_asked(dtype), device=usable_device(device))
        self.device: torch.device = options["device"]
        backends.name_for(self.device)  # an absent CNA_BACKEND fails here, before files are read
        own_only = "stream_layers" if stream_layers else None if mesh is None else "tensor_parallel"
        chosen = Chosen(self.directory, engine, own_only=own_only, hf_only=bool(device_map or model_args))
        self.engine, self.config = chosen.engine, chosen.config
        self.tokenizer = Tokenizer(directory, self.config.vocab_size)
        self.encoder = PromptEncoder(
            self.tokenizer, self.config.context_length, system=system, template_args=template_args
        )
        self.stop_ids = stop_ids(directory, self.tokenizer, self.config.vocab_size)
        self.checkpoint = open_checkpoint(directory)
        self.transformer: Transformer = chosen.load(
            self.checkpoint, **options, stream_layers=stream_layers, spill=spill, mesh=mesh, weights=weights,
            device_map=device_map, model_args=model_args,
        )  # fmt: skip
        of_model = partial(chosen.identity, self.checkpoint, lambda: self.transformer)
        self._identity = Identity(self.checkpoint, of_model)
        self._steering: tuple[SteeringTable, Tensor | None] | None = None

    def __repr__(self) -> str:
        return summary_of(self)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return logits ``[B, S, V]`` for whole sequences ``[B, S]``, steered inside :meth:`steered`."""
        self._require_logits()
        return self.transformer(input_ids, steer=self._steer(input_ids.shape[0]))

    def warm_up(self, longest: int = 4096, *, n_columns: int = 2, squares: bool = False) -> list[int]:
        """Compile the kernels that the MLPs launch for any number of tokens: plain, steered, and with sums.

        Args:
            longest: the most tokens of a forward pass.
            n_columns: columns of the sums; 2 for discovery.
            squares: whether the sums have squares, as the score "cohen-d" needs.

        Returns:
            The numbers of tokens that the MLP was called with; none where nothing is compiled.
        """
        self._require_logits()
        return self.transformer.warm_up(longest, n_columns=n_columns, squares=squares)

    def _require_logits(self):
        if not self.transformer.answers:
            raise InputError("model", "a model whose layers are streamed or shared finds circuits, and nothing else")

    def identity(self) -> dict[str, str]:
        """Return the checkpoint's name and hashes; see ``checkpoint.identity.identity_of``."""
        return self._identity()

    def describe(self, chat: bool | None = None, *, hashed: bool = True) -> str:
        """What prompts meet, in a line: the model, its engine, the chat template and what ends an answer.

        Args:
            hashed: whether the weights' hash is in it, for which all weights are read once.
        """
        return described(self, chat, hashed=hashed)

    def encode(self, prompts: PromptSet, *, chat: bool | None = None, double_bos: bool = False) -> list[TokenPrompt]:
        """Tokenise each prompt, as the user's message of a chat or as plain text; see :class:`PromptEncoder`."""
        return self.encoder.encode(prompts, chat=chat, double_bos=double_bos)

    def discover(
        self,
        positive: Sequence[str] | PromptSet,
        negative: Sequence[str] | PromptSet,
        *,
        universal_prompts: Sequence[str] | PromptSet | bool | None = None,
        chat: bool | None = None,
        batch: int | None = None,
        max_tokens: int | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Circuit:
        """Find the neurons whose activation at the last prompt token differs most between two prompt sets.

        Args:
            positive, negative: prompts that show the behaviour, and prompts that do not.
            universal_prompts: diverse prompts for the universal filter; None takes the built-in ones, False turns
                the filter off.
            chat: whether prompts go through the chat template; None: where the checkpoint has one.
            batch: prompts a forward pass. max_tokens: tokens a forward pass instead; None chooses by device.
            progress: called with (prompts done, prompts in all, tokens done).
            settings: ``fraction``, ``top_k``, ``score``, ``universal_threshold``, ``skip_layers``, ``position``,
                ``bootstrap``, ``folds``, ``seed``, ``preset``; see
                :class:`cna_kernels.model.discovery.settings.Settings`.

        Raises:
            InputError: an argument or a prompt cannot be used; names it.
        """
        wanted = None if universal_prompts is None else True
        if isinstance(universal_prompts, bool):
            wanted, universal_prompts = universal_prompts, None
        chosen = settings_from(universal=wanted, **settings)
        neutral: PromptSet | tuple[()] = ()
        if chosen.universal:
            neutral = neutral_prompts() if universal_prompts is None else PromptSet.of(universal_prompts, "neutral")
        names = Names()
        entries = two_sets(names, PromptSet.of(positive, "positive"), PromptSet.of(negative, "negative"), neutral)
        how: dict[str, Any] = dict(chat=chat, batch=batch, max_tokens=max_tokens, progress=progress)
        with TemporaryFile() as file:
            corpus = Corpus(file, entries, names)
            return self.discover_corpus(corpus, [Contrast("circuit", 0, 1)], chosen, **how)["circuit"]

    def discover_corpus(
        self,
        corpus: Corpus,
        contrasts: Sequence[Contrast],
        settings: Settings,
        *,
        skip_bad: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> dict[str, Circuit]:
        """Find the circuits of many contrasts in one pass over a corpus. Returns contrast name -> circuit.

        Args:
            contrasts: pairs of the corpus's columns.
            skip_bad: leave out prompts that are too long for the model.
            progress: as in :meth:`discover`.
            options: ``diverse``, ``chat``, ``batch``, ``max_tokens``, ``squares``; see :class:`Job`.
        """
        job = Job(self, corpus, contrasts, settings, **options)
        for note in job.notes:
            warnings.warn(note, InputWarning, stacklevel=3)
        return job.circuits(job.run_all(skip_bad=skip_bad, progress=progress))

    def relevance(
        self,
        prompts: str | Sequence[str] | PromptSet,
        target: str | Sequence[str],
        counterfactual: str | Sequence[str],
        *,
        chat: bool | None = None,
    ) -> Tensor:
        """Return how far each neuron moves the next token from the counterfactual to the target, fp64 ``[L, N]``.

        Gradient attribution by relevance propagation, for comparison with :meth:`discover`; see ``evaluation/relp.py``.

        Args:
            prompts: one prompt, or several: then the mean over them is returned.
            target, counterfactual: a text, or several; of each text only the first token is used.
        """
        require_own(self.transformer, "relevance needs gradients")
        prompts = PromptSet.of([prompts] if isinstance(prompts, str) else prompts, "prompts")
        first = self.tokenizer.first_ids
        sides = first(target, "target"), first(counterfactual, "counterfactual")
        return relevance(self.transformer, self.encode(prompts, chat=chat), *sides)

    @renamed(rows="row_circuit")
    @contextmanager
    def steered(
        self,
        circuit: Given | Sequence[Given],
        multiplier: float | Sequence[float],
        *,
        row_circuit: Sequence[int] | None = None,
        any_model: bool = False,
    ) -> Iterator[SteeringTable]:
        """Steer every call inside the ``with`` block, at every position of prompt and answer.

        The state belongs to the model, not to the thread: a model is used by one thread at a time.

        Yields the SteeringTable: its ``set_multipliers`` changes multipliers between calls without rebuilding.

        Args:
            circuit: one, or several for one batch. A path is that of a circuit's file: :meth:`check_circuit` checks it.
            multiplier: one for all circuits, or one for each: 0 ablates, 1 changes nothing, above 1 scales up.
            row_circuit: the number of the circuit that each row of the batch uses, -1 for none. None: all rows use 0.
            any_model: take a file's circuit though it was found in another checkpoint of this shape.
        """
        given = circuits_of(circuit, self, any_model=any_model, prompts=False)
        circuits = [given] if isinstance(given, Circuit) else list(given)
        multipliers = list(multiplier) if isinstance(multiplier, Sequence) else [multiplier] * len(circuits)
        table = self.transformer.new_table(circuits, multipliers)
        outer = self._steering
        self._steering = table, None if row_circuit is None else table.row_circuit(row_circuit)
        try:
            yield table
        finally:
            self._steering = outer

    def generate(
        self,
        prompts: str | Sequence[str] | PromptSet,
        *,
        circuit: Given | Sequence[Given | None] | None = None,
        multiplier: float | Sequence[float] = 0.0,
        max_new_tokens: int = 150,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        chat: bool | None = None,
        batch: int | None = None,
        any_model: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> str | list[str]:
        """Answer a prompt, or several prompts in batches.

        Args:
            circuit: one that steers every prompt; or a list with one or None for each. Paths as in :meth:`steered`.
            multiplier: one for all prompts, or one for each.
            temperature, top_k, top_p: as in :class:`Sampling`; temperature 0 is greedy.
            seed: for sampling, one for each prompt. A single number is the first prompt's; the next add 1, 2, ...
            batch: prompts decoded together; None takes GENERATE_ROWS.
            any_model: as in :meth:`steered`.
            on_text: called with (row, new text) while the answers grow.

        Returns:
            The answer, or a list of answers where a list of prompts was given.
        """
        self._require_logits()
        single = isinstance(prompts, str)
        prompts = PromptSet.of([prompts] if isinstance(prompts, str) else prompts, "prompts")
        tokens = self.encode(prompts, chat=chat)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed + row for row in range(len(tokens))]
        if len(seeds) != len(tokens):
            raise InputError("seed", f"expected one, or {len(tokens)}, one for each prompt, got {len(seeds)}")
        sampling = Sampling(temperature, top_k, top_p)
        answers: list[list[int]] = []
        batch = GENERATE_ROWS if batch is None else batch
        if batch < 1:
            raise InputError("batch", f"expected at least 1, got {batch}")
        circuit = circuits_of(circuit, self, any_model=any_model, chat=chat)
        with nullcontext() if circuit is None else self._steered_rows(circuit, multiplier, len(prompts)):
            for start in range(0, len(tokens), batch):
                chunk = tokens[start : start + batch]
                stream = None if on_text is None else TextStream(self.tokenizer, start, on_text)
                answers += generate(
                    self.transformer,
                    chunk,
                    max_new_tokens=max_new_tokens,
                    stop_ids=self.stop_ids,
                    sampling=sampling,
                    seeds=seeds[start : start + batch],
                    steer=self._steer(len(tokens), start, start + len(chunk)),
                    on_token=stream,
                )
                if stream is not None:
                    stream.finish()
        texts = [self.tokenizer.decode(ids) for ids in answers]
        return texts[0] if single else texts

    def check_circuit(
        self, circuit: Circuit, where: FilePath, *, any_model: bool = False, chat: bool | None = None
    ) -> None:
        """Raise InputError naming the field unless the circuit of a file was found in this very checkpoint.

        Of imported circuits only the shape is checked. Another template is a warning; with ``any_model``, which takes
        every circuit of this shape, only plain text for a template, or a template for plain text.
        """
        check_circuit(self, circuit, where, any_model=any_model, chat=chat)

    def _steered_rows(self, circuit, multiplier, n_rows):
        """The context that gives each row its circuit and multiplier; rows with equal pairs share a table entry."""
        if isinstance(circuit, Circuit):
            circuit = [circuit] * n_rows
        multiplier = list(multiplier) if isinstance(multiplier, Sequence) else [multiplier] * n_rows
        for name, given in (("circuit", circuit), ("multiplier", multiplier)):
            if len(given) != n_rows:
                raise InputError(name, f"expected one, or {n_rows}, one for each prompt, got {len(given)}")
        circuits, multipliers, rows = distinct(circuit, multiplier)
        return self.steered(circuits, multipliers, row_circuit=rows)

    def _steer(self, n_rows: int, start: int = 0, end: int | None = None) -> Steering | None:
        """The Steering of rows ``start:end`` of a batch of ``n_rows``; None outside :meth:`steered`."""
        if self._steering is None:
            return None
        table, rows = self._steering
        if rows is None:
            rows = torch.zeros(n_rows, dtype=torch.int32, device=self.device)
        if len(rows) != n_rows:
            raise InputError("row_circuit", f"expected {n_rows}, one for each row of the batch, got {len(rows)}")
        return Steering(table, rows[start:end])
