"""The model type "cna" of EleutherAI's lm-evaluation-harness: its tasks on a steered model.

    cna lm-eval --model cna --model_args pretrained=DIR,circuit=circuit.json,multiplier=0 --tasks mmlu --device cpu

runs the harness's own command line after registering the type: the harness itself finds only types of its own package.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from cna_kernels.errors import InputError, one_line
from cna_kernels.fields import short

from ..cli.arguments import load_circuit
from ..cli.flags import SIGNS
from ..discovery.packing import TokenPrompt
from ..generate import Sampling, generate
from ..language_model import load
from .interventions import UNSTEERED, Interventions, Method, Variant
from .likelihood import each_logits

if TYPE_CHECKING:
    from ..parallel.lead import Lead

NAME = "cna"
MAX_NEW_TOKENS = 256  # the longest answer where a task sets none


class CnaLM(TemplateLM):
    """A checkpoint, steered by a circuit at a multiplier.

    Attributes:
        lead: of ranks that share the model, else None; see ``parallel/lead.py``.
    """

    lead: Lead | None = None

    def __init__(
        self,
        pretrained,
        circuit=None,
        multiplier: float = 0.0,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 16,
        max_batch_size: int | None = None,
        any_model: bool = False,
        sign: str | None = None,
        engine: str = "auto",
        device_map: str | None = None,
        **unknown,
    ):
        """
        Args:
            pretrained: checkpoint directory, or another MODEL of the command line.
            circuit: circuit file; without one the model is not steered.
            multiplier: the circuit's multiplier.
            batch_size: answers decoded together.
            max_batch_size: accepted because the harness passes it; not used.
            any_model: accept a circuit found in another checkpoint of the same shape.
            engine, device_map: as of ``load``: "own" or "transformers"; "auto" for several GPUs.
            sign: which of the circuit's neurons, as --sign of the other commands: one of SIGNS.
        """
        super().__init__()
        if unknown:
            raise InputError(f"model_args: {next(iter(unknown))}", "is no argument of the model type cna")
        if sign is not None and sign not in SIGNS:
            raise InputError("model_args: sign", f"expected one of {', '.join(SIGNS)}, got {short(sign)}")
        if sign is not None and circuit is None:
            raise InputError("model_args: sign", "is for a circuit, and none is given")
        how: dict[str, Any] = dict(engine=engine, device=device or None, dtype=dtype, device_map=device_map)
        self.model = load(pretrained, **how, mesh=self.lead)
        variant = UNSTEERED
        if circuit is not None:
            loaded = load_circuit(circuit, self.model, any_model=any_model, sign=sign)
            variant = Variant(Method("circuit", "", loaded), float(multiplier))
        self.interventions = Interventions(self.model, [variant])
        asked = str(batch_size or "")
        self.batch = int(asked) if asked.isdecimal() else 16
        self._device = self.model.device
        self._rendered = False  # the harness has rendered requests as chats
        self._said = False

    def _say_model(self) -> None:
        """Say on stderr, at the first request, which model, template and stop tokens are used."""
        if not self._said:
            print(f"cna lm-eval: {one_line(self.model.describe(self._rendered))}", file=sys.stderr)
        self._said = True

    @property
    def eot_token_id(self) -> int:
        eos = self.model.tokenizer.eos_id
        return min(self.model.stop_ids, default=0) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        return f"{self.model.tokenizer.sha256}-{self.model.tokenizer.template_sha256}"

    def chat_template(self, chat_template=False) -> str:
        template = self.model.tokenizer.template
        return template.source if chat_template and template else ""

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        template = self.model.tokenizer.template
        if template is None or not add_generation_prompt:
            raise InputError("--apply_chat_template", "the checkpoint has no template, or the task ends in an answer")
        self._rendered = True
        return template.render([chat_history])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        begun = self.model.tokenizer.token(self.prefix_token_id)
        if add_special_tokens is False or (add_special_tokens is None and begun and string.startswith(begun)):
            return self.model.tokenizer.encode_answer(string)  # a rendered chat brings its own BOS
        return self.model.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        self._say_model()
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number][1]) - len(requests[number][2]))
        whole = [(requests[number][1] + requests[number][2])[-(self.max_length + 1) :] for number in order]
        rows = [(0, ids[:-1]) for ids in whole]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        logits = each_logits(self.model, self.interventions, rows)
        for number, row in zip(order, tqdm(logits, total=len(rows), disable=disable_tqdm), strict=True):
            answer = requests[number][2]
            log_p = row[len(row) - len(answer) :].log_softmax(-1)
            chosen = log_p.gather(1, log_p.new_tensor(answer, dtype=int)[:, None])[:, 0]
            greedy = log_p.argmax(-1).tolist() == list(answer)
            found[number] = chosen.double().sum().item(), greedy
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in tqdm(requests, disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self._say_model()
        order = sorted(range(len(requests)), key=lambda number: len(requests[number].args[0]))
        found = [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for number in order:
            groups.setdefault(_options(requests[number].args[1])[1:], []).append(number)
        with contextlib.closing(tqdm(total=len(requests), disable=disable_tqdm)) as bar:
            for (most, sampling), members in groups.items():
                for start in range(0, len(members), self.batch):
                    chunk = members[start : start + self.batch]
                    for number, text in zip(chunk, self._write(requests, chunk, most, sampling), strict=True):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(chunk))
        return found

    def _write(self, requests, chunk, most, sampling) -> list[str]:
        """The answers to a chunk of requests. Each is cut where one of its task's stop texts begins."""
        room = max(self.max_length - most, 1)
        prompts = [
            TokenPrompt(self.tok_encode(requests[number].args[0])[-room:], f"request {number}") for number in chunk
        ]
        answers = generate(
            self.model.transformer, prompts, max_new_tokens=most, stop_ids=self.model.stop_ids, sampling=sampling,
            seeds=chunk, steer=self.interventions.steer([0] * len(chunk)),
        )  # fmt: skip
        texts = []
        for number, tokens in zip(chunk, answers, strict=True):
            text = self.model.tokenizer.decode(tokens)
            for stop in _options(requests[number].args[1])[0]:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts


def _options(given: dict) -> tuple[tuple[str, ...], int, Sampling]:
    """A task's options: stop texts, the most new tokens, and how to sample."""
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    most = int(given.get("max_gen_toks", given.get("max_new_tokens", MAX_NEW_TOKENS)))
    if not given.get("do_sample", bool(given.get("temperature"))):
        return until, most, Sampling()
    return (
        until,
        most,
        Sampling(float(given.get("temperature", 1.0)), int(given.get("top_k", 0)), float(given.get("top_p", 1.0))),
    )


def register(lead: Lead | None = None):
    """Make ``--model cna`` known to the harness of this process."""
    CnaLM.lead = lead
    register_model(NAME)(CnaLM)
