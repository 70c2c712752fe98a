"""What a request asks for, and what it carries to the workers.

A request names circuits in ``SamplingParams.extra_args``, over HTTP in ``vllm_xargs``:

- ``cna_circuit``: a name, or a list of names;
- ``cna_multiplier``: a number for all of them, or a list with one for each; by default 0, which ablates;
- ``cna_phase``: "prompt" or "answer" steers only those tokens, "both", the default, all of the request's;
- ``cna_column``: the column that the request's last prompt token counts in.

The front end puts what they mean under ``cna`` of the same arguments: the neurons themselves, so that workers need no
names, and a name may mean another circuit at any time.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..circuit import Circuit
from ..engine.requests import PHASES
from ..errors import InputError
from ..fields import short
from ..steering import check_multiplier
from .identity import check_model, identity_of
from .options import KEY, Options, options_of
from .registry import Registry, check_name
from .setting import Setting, setting_of

CIRCUIT, MULTIPLIER, PHASE, COLUMN = "cna_circuit", "cna_multiplier", "cna_phase", "cna_column"
KNOWN = (CIRCUIT, MULTIPLIER, PHASE, COLUMN)
_MOST_CIRCUITS = 64  # of one request
_KEPT = 1024  # settings of earlier requests
HOW = 'start the engine with additional_config={"cna": {"circuits": ...}}'


@dataclass(frozen=True)
class Asked:
    """What one request asks for.

    Attributes:
        names, multipliers: its circuits.
        setting: what they do; None where they change nothing.
        phase: the tokens that are steered, one of PHASES.
        column: the column it counts in; None for none.
    """

    names: tuple[str, ...]
    multipliers: tuple[float, ...]
    setting: Setting | None
    phase: str
    column: int | None

    def record(self) -> dict[str, Any]:
        """What the request carries to the workers."""
        setting = None if self.setting is None else self.setting.record()
        return {"setting": setting, "phase": self.phase, "column": self.column, "report": self.report()}

    def report(self) -> dict[str, Any]:
        """What was applied, for the request's output."""
        circuits = [{"circuit": n, "multiplier": m} for n, m in zip(self.names, self.multipliers, strict=True)]
        setting = self.setting
        return {
            "circuits": circuits, "n_neurons": 0 if setting is None else len(setting.layer),
            "sha256": None if setting is None else setting.digest, "phase": self.phase, "column": self.column,
        }  # fmt: skip

    def salted(self, salt: str | None, n_prompt: int) -> str | None:
        """A request's salt of the prefix cache: keys and values that were steered otherwise are no part of it.

        Where a phase begins or ends with the prompt, the same tokens behind a prompt of another length are steered
        otherwise.
        """
        if self.setting is None:
            return salt_of_others(salt)
        phase = "" if self.phase == "both" else f" {self.phase} {n_prompt}"
        return hashlib.sha256(f"cna {self.setting.digest}{phase} {salt!r}".encode()).hexdigest()


class FrontEnd:
    """The circuits of one engine, where requests come in."""

    def __init__(self, options: Options, model_config: Any) -> None:
        self.options, self._model_config = options, model_config
        text = model_config.hf_text_config
        self.n_layers, self.n_neurons = int(text.num_hidden_layers), int(text.intermediate_size)
        self.max_neurons = options.max_neurons or default_max_neurons(self.n_layers, self.n_neurons)
        check = functools.partial(check_model, model_config=model_config)
        self.registry = Registry(
            options.circuits, self.n_layers, self.n_neurons, *([] if options.any_model else [check])
        )
        self._settings: OrderedDict[Any, tuple[tuple[Circuit, ...], Setting | None]] = OrderedDict()
        self._lock = threading.Lock()

    def resolve(self, extra: Mapping[str, Any] | None) -> Asked | None:
        """What ``extra_args`` ask for; None where they ask for nothing. Raises InputError naming the argument."""
        keys = own_keys(extra)
        if extra is None or not keys:
            return None
        if isinstance(extra.get(KEY), Asked):  # resolved already
            asked: Asked = extra[KEY]
            return asked
        if unknown := sorted(keys - set(KNOWN)):
            raise InputError(unknown[0], f"is unknown; known are {', '.join(KNOWN)}")
        for name in (MULTIPLIER, PHASE):
            if name in keys and CIRCUIT not in keys:
                raise InputError(name, f"expected together with {CIRCUIT}")
        if (phase := extra.get(PHASE, "both")) not in PHASES:
            raise InputError(PHASE, f"expected one of {', '.join(PHASES)}, got {short(phase)}")
        names, multipliers = self._circuits(extra) if CIRCUIT in keys else ((), ())
        setting = None
        if names:
            circuits = tuple(self.registry.get(name) for name in names)
            setting = self._setting_of(circuits, multipliers)
            if setting is not None and len(setting.layer) > self.max_neurons:
                what = f"{len(setting.layer)} neurons together, the engine takes {self.max_neurons}; see max_neurons"
                raise InputError(CIRCUIT, what)
        return Asked(names, multipliers, setting, phase, self._column(extra))

    def provenance(self) -> dict[str, Any]:
        """What the file of a circuit that is found here says of the model."""
        dtype = str(self._model_config.dtype).removeprefix("torch.")
        return {"model": identity_of(self._model_config), "dtype": dtype}

    def _setting_of(self, circuits: tuple[Circuit, ...], multipliers: tuple[float, ...]) -> Setting | None:
        key = tuple(map(id, circuits)), multipliers  # the circuits are kept beside: no other gets the number of one
        with self._lock:
            if key not in self._settings:
                self._settings[key] = circuits, setting_of(circuits, multipliers)
            self._settings.move_to_end(key)
            if len(self._settings) > _KEPT:
                self._settings.popitem(last=False)
            return self._settings[key][1]

    def _circuits(self, extra: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
        given, m = extra[CIRCUIT], extra.get(MULTIPLIER, 0.0)
        names = tuple(check_name(name) for name in (given if isinstance(given, (list, tuple)) else [given]))
        each = tuple(m) if isinstance(m, (list, tuple)) else (m,) * len(names)
        if not 0 < len(names) <= _MOST_CIRCUITS:
            raise InputError(CIRCUIT, f"expected 1 to {_MOST_CIRCUITS} names, got {len(names)}")
        if len(each) != len(names):
            raise InputError(MULTIPLIER, f"expected one number, or {len(names)}, got {len(each)}")
        for number in each:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise InputError(MULTIPLIER, f"expected a finite number, got {short(number)}")
        try:
            return names, tuple(check_multiplier(number) for number in each)
        except InputError as error:
            raise InputError(MULTIPLIER, error.what) from None

    def _column(self, extra: Mapping[str, Any]) -> int | None:
        column = extra.get(COLUMN)
        if column is None:
            return None
        n = self.options.columns
        if not n:
            raise InputError(COLUMN, 'this engine sums nothing: additional_config={"cna": {"columns": 2}} lets it')
        if type(column) is not int or not 0 <= column < n:
            raise InputError(COLUMN, f"expected 0 to {n - 1}, got {short(column)}")
        return column


def salt_of_others(salt: str | None) -> str | None:
    """The salt of an unsteered request: what a client writes is never the salt of a steered one."""
    return None if salt is None else hashlib.sha256(f"plain {salt!r}".encode()).hexdigest()


def default_max_neurons(n_layers: int, n_neurons: int) -> int:
    """The most neurons of one request where nothing is said: 1% of the model's."""
    return max(256, -(-n_layers * n_neurons // 100))


def own_keys(extra: Mapping[str, Any] | None) -> set[str]:
    """The arguments that are the plug-in's, misspelt ones among them."""
    return {name for name in extra or () if isinstance(name, str) and name.lower().startswith(KEY)}


def front_end_of(processor: Any) -> FrontEnd | None:
    """The front end of a vLLM ``InputProcessor``; None where the engine was started without the plug-in's options."""
    if not hasattr(processor, "_cna"):
        options = options_of(processor.vllm_config)
        processor._cna = None if options is None else FrontEnd(options, processor.vllm_config.model_config)
    found: FrontEnd | None = processor._cna
    return found


def resolve(processor: Any, extra: Mapping[str, Any] | None) -> Asked | None:
    """:meth:`FrontEnd.resolve` of a processor's engine. Raises InputError also where the engine takes no circuits."""
    keys = own_keys(extra)
    if not keys:
        return None
    front = front_end_of(processor)
    if front is None:
        raise InputError(sorted(keys)[0], f"this engine takes no circuits: {HOW}")
    return front.resolve(extra)
