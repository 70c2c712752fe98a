"""The plug-in in a worker: steers and sums the rows of every step that the model runner prepares."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import warn
from ..sums import ActivationSums, NonFiniteActivation
from . import act
from .hooks import around
from .mlps import find
from .options import KEY, Options
from .requests import default_max_neurons
from .slots import Slots

_COUNTED = 1 << 16  # requests that are remembered as counted, of those that run


class Step:
    """One request's part of a step.

    Attributes:
        request_id: the request.
        record: what it carries, or None.
        n_tokens: its tokens in the step, from position ``first`` on.
        n_prompt: the tokens of its prompt.
    """

    __slots__ = ("first", "n_prompt", "n_tokens", "record", "request_id")

    def __init__(
        self, request_id: str, record: dict[str, Any] | None, n_tokens: int, first: int, n_prompt: int
    ) -> None:
        self.request_id, self.record, self.n_tokens = request_id, record, n_tokens
        self.first, self.n_prompt = first, n_prompt


class Steering:
    """Puts itself on the model of a vLLM worker, and tells its layers before every step which row does what."""

    def __init__(self, worker: Any, options: Options) -> None:
        runner, config = worker.model_runner, worker.vllm_config
        text, scheduler = config.model_config.hf_text_config, config.scheduler_config
        n_layers, self.n_neurons = int(text.num_hidden_layers), int(text.intermediate_size)
        first, last = _layers(config)
        model = runner.get_model()
        mlps = find(model, range(first, last), self.n_neurons)
        low, n = next(((mlp.low, mlp.n) for mlp in mlps.values()), (0, self.n_neurons))
        captured = config.compilation_config.max_cudagraph_capture_size or 0
        n_rows = max(scheduler.max_num_batched_tokens, captured, scheduler.max_num_seqs)
        device = torch.device(worker.device)
        max_neurons = options.max_neurons or default_max_neurons(n_layers, self.n_neurons)
        self.slots = Slots(n_layers, low, n, scheduler.max_num_seqs, max_neurons, device)
        self.sums = ActivationSums(n_layers, n, options.columns, device=device) if options.columns else None
        self.layers, self.low, self.n, self.stamp = sorted(mlps), low, n, options.stamp
        self.state = act.StepState(self.slots.table, n_rows, self.sums, device)
        self.refused: list[str] = []  # requests whose activations were not finite: they are in no sum
        self.n_steered = 0  # tokens
        self._written = 0  # rows that the last step left
        self._counting: list[tuple[str, int]] = []  # the requests that the step at hand counts, and their columns
        self._counted: OrderedDict[str, None] = OrderedDict()
        for layer, mlp in mlps.items():
            mlp.module.act_fn = act.SteeredAct(mlp.module.act_fn, layer, device)  # type: ignore[arg-type]
        act.use(self.state)
        _hook(runner, self)

    def begin(self, steps: Sequence[Step]) -> None:
        """Tell the layers what each row of the step does that is about to run."""
        act.use(self.state)
        weight = self._weights(steps)
        n_rows = sum(step.n_tokens for step in steps)
        steered = [_steered(step) for step in steps]
        asked = [step.record["setting"] if span else None for step, span in zip(steps, steered, strict=True)]  # type: ignore[index]
        self.state.steers, self.state.counts = any(asked), weight is not None
        if not self.state.steers and not self._written:
            return  # nothing to write, and nothing left
        used = {setting["digest"] for setting in asked if setting}
        numbers = [self.slots.number_of(setting, used) if setting else -1 for setting in asked]
        rows, at = np.full(n_rows, -1, np.int32), 0
        for step, span, number in zip(steps, steered, numbers, strict=True):
            rows[at + span.start : at + span.stop] = number
            at += step.n_tokens
        self.n_steered += int((rows >= 0).sum())
        _write(self.state.row_circuit, rows)
        self.state.row_circuit[n_rows : self._written].fill_(-1)  # padding rows are unsteered
        self._written = n_rows if self.state.steers else 0

    def _weights(self, steps: Sequence[Step]) -> np.ndarray[Any, Any] | None:
        """Write what the step counts: the last prompt token of each request that names a column, once."""
        self._counting = []
        weights = self.state.token_weight
        if weights is None:
            return None
        at, found = 0, []
        for step in steps:
            column = None if step.record is None else step.record.get("column")
            last = step.n_prompt - 1 - step.first
            if column is not None and 0 <= last < step.n_tokens and step.request_id not in self._counted:
                found.append((at + last, column))
                self._counting.append((step.request_id, column))
            at += step.n_tokens
        if not found:
            return None
        dense = np.zeros((at, weights.shape[1]), np.float32)
        rows, columns = np.array(found).T
        dense[rows, columns] = 1
        _write(weights, dense)
        return dense

    def end(self) -> None:
        """Take the sums of the step that was launched, and count nothing from now on."""
        if not self._counting or self.sums is None or self.state.token_weight is None:
            return
        counting, self._counting, self.state.counts = self._counting, [], False
        self.state.token_weight.zero_()
        weights = torch.zeros((len(counting), self.sums.count.shape[0]), dtype=torch.float32)
        for row, (_, column) in enumerate(counting):
            weights[row, column] = 1
        for request_id, _ in counting:
            self._counted[request_id] = None
            if len(self._counted) > _COUNTED:
                self._counted.popitem(last=False)
        try:
            self.sums.fold(weights)
        except NonFiniteActivation as error:
            self.refused += [request_id for request_id, _ in counting]
            warn(f"cna: {error}: of {len(counting)} requests nothing is summed")

    def forget(self, finished: Sequence[str]) -> None:
        """Forget requests that have ended."""
        for request_id in finished:
            self._counted.pop(request_id, None)

    def report(self) -> dict[str, Any]:
        """What this worker holds and has done."""
        return {
            "stamp": self.stamp, "layers": self.layers, "low": self.low, "n": self.n, "settings": len(self.slots),
            "steered_tokens": self.n_steered, "refused": list(self.refused),
        }  # fmt: skip

    def totals(self, reset: bool) -> dict[str, Any]:
        """The sums of this worker's neurons so far; ``reset`` begins anew."""
        if self.sums is None:
            raise ValueError('cna: this engine sums nothing: additional_config={"cna": {"columns": 2}} lets it')
        found = {
            "layers": self.layers, "low": self.low, "n": self.n, "count": self.sums.count.tolist(),
            "total": self.sums.total.cpu().numpy().tobytes(), "refused": list(self.refused),
        }  # fmt: skip
        if reset:
            self.sums.total.zero_()
            self.sums.count.zero_()
            self.refused.clear()
        return found


def _steered(step: Step) -> range:
    """The tokens of a step that its request has steered, counted from the first of them."""
    record = step.record
    if not record or not record.get("setting"):
        return range(0)
    n_of_prompt = min(max(step.n_prompt - step.first, 0), step.n_tokens)
    phase = record["phase"]
    return range(n_of_prompt if phase == "answer" else 0, n_of_prompt if phase == "prompt" else step.n_tokens)


def _layers(config: Any) -> tuple[int, int]:
    """The layers that this rank of a pipeline holds: the first, and the one behind the last."""
    first, last = config.model_config.get_layers_start_end_indices(config.parallel_config)
    return int(first), int(last)


def _write(buffer: Tensor, values: np.ndarray[Any, Any]) -> None:
    """Copy to the first rows of a buffer, which steps that still run on a GPU read before."""
    new = torch.from_numpy(values)
    if buffer.device.type == "cuda":
        new = new.pin_memory()  # the allocator keeps it until the copy is done
    buffer[: len(values)].copy_(new, non_blocking=True)


def _record(params: Any) -> dict[str, Any] | None:
    extra = getattr(params, "extra_args", None)
    return extra.get(KEY) if extra else None


def _hook(runner: Any, steering: Steering) -> None:
    """Have the model runner tell of every step: V2 by its model's state, V1 by its own preparation of inputs."""
    if hasattr(runner, "model_state"):
        _hook_v2(runner.model_state, steering)
    else:
        _hook_v1(runner, steering)

    def execute(inner: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        steering.forget(list(scheduled.finished_req_ids))
        try:
            return inner(scheduled, *args, **kwargs)
        finally:
            steering.end()

    around(runner, "execute_model", ["scheduler_output"], execute)


def _hook_v1(runner: Any, steering: Steering) -> None:
    def prepare(inner: Any, scheduled: Any, counts: Any) -> Any:
        batch = runner.input_batch
        steps = []
        for row, request_id in enumerate(batch.req_ids):
            request = runner.requests[request_id]
            first, n_prompt = int(batch.num_computed_tokens_cpu[row]), request.num_prompt_tokens
            steps.append(Step(request_id, _record(request.sampling_params), int(counts[row]), first, n_prompt))
        steering.begin(steps)
        return inner(scheduled, counts)

    around(runner, "_prepare_inputs", ["scheduler_output", "num_scheduled_tokens"], prepare)


def _hook_v2(state: Any, steering: Steering) -> None:
    known: dict[str, tuple[dict[str, Any] | None, int]] = {}  # of each request what it carries, and its prompt's tokens

    def add(inner: Any, index: int, new: Any) -> Any:
        known[new.req_id] = _record(new.sampling_params), int(new.prompt_len)
        return inner(index, new)

    def remove(inner: Any, request_id: str) -> Any:
        known.pop(request_id, None)
        return inner(request_id)

    def prepare(inner: Any, batch: Any, states: Any) -> Any:
        steps = []
        for row, request_id in enumerate(batch.req_ids):
            record, n_prompt = known.get(request_id, (None, 0))  # a dummy's rows are nobody's
            first = int(batch.num_computed_tokens_np[row])
            steps.append(Step(request_id, record, int(batch.num_scheduled_tokens[row]), first, n_prompt))
        steering.begin(steps)
        return inner(batch, states)

    around(state, "add_request", ["req_index", "new_req_data"], add)
    around(state, "remove_request", ["req_id"], remove)
    around(state, "prepare_inputs", ["input_batch", "req_states"], prepare)
