"""Circuits by the names of their files: read, and checked against the model that they are to steer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cna_kernels.circuit import Circuit, check_fits, check_found_in, check_template
from cna_kernels.errors import InputError, InputWarning
from cna_kernels.fields import short
from cna_kernels.files import FilePath, read_json

from .hub.find import circuit_path

if TYPE_CHECKING:
    from .language_model import LanguageModel

Given = Circuit | FilePath  # a circuit, or the file of one


def read_circuit(
    path: FilePath, model: LanguageModel, *, any_model: bool = False, chat: bool | None = None, prompts: bool = True
) -> Circuit:
    """The circuit of a file, or of a name on the Hub, checked by :meth:`LanguageModel.check_circuit`.

    Args:
        chat: whether prompts go through the chat template.
        prompts: whether it is known that there are prompts, and how they go: then a circuit that was found on plain
            text is compared with them, too.

    Raises:
        InputError: the file is no circuit, or one of another model; names the file.
    """
    shape = dict(n_layers=model.config.num_hidden_layers, n_neurons=model.config.intermediate_size)
    circuit = Circuit.from_record(read_json(circuit_path(path)), path, **shape)
    if not prompts and circuit.chat_template_sha256 is None:
        chat = False
    model.check_circuit(circuit, path, any_model=any_model, chat=chat)
    if circuit.experts is None and model.config.experts is not None:  # an older file, or the public code's
        circuit = replace(circuit, experts=model.config.experts)
    return circuit


def check_circuit(
    model: LanguageModel, circuit: Circuit, where: FilePath, *, any_model: bool, chat: bool | None
) -> None:
    """See ``LanguageModel.check_circuit``."""
    check_fits(circuit, model.config.num_hidden_layers, model.config.intermediate_size, where)
    template = model.tokenizer.template_sha256 if model.encoder.uses_chat(chat) else None
    if any_model:
        check_template(circuit, template, where, any_template=True)
        return
    here: dict[str, str | None] = {f"model.{name}": value for name, value in model.identity().items()}
    here |= dict(tokenizer_sha256=model.tokenizer.sha256, chat_template_sha256=template)
    check_found_in(circuit, here, where)
    found_with = {name: (circuit.chat or {}).get(name) for name in ("args", "system")}
    if circuit.chat_template_sha256 and found_with != {
        "args": model.encoder.template_args or (None if circuit.chat is None else {}),
        "system": model.encoder.system,
    }:
        what = f"found with {found_with}, which this model is not loaded with"
        warnings.warn(f"{where}: {what}", InputWarning, stacklevel=4)


def circuits_of(given: Any, model: LanguageModel, **how: Any) -> Any:
    """``given``, a circuit, a file or a list of these and None, with the files' circuits in the files' place.

    Each file is read once. ``how``: options of :func:`read_circuit`.
    """
    read: dict[str, Circuit] = {}

    def one(item):
        if isinstance(item, (str, os.PathLike)):
            path = os.fspath(item)
            if path not in read:
                read[path] = read_circuit(path, model, **how)
            return read[path]
        if item is None or isinstance(item, Circuit):
            return item
        raise InputError("circuit", f"expected a Circuit, or the file of one, got {short(item)}")

    if isinstance(given, Iterable) and not isinstance(given, (str, Circuit)):
        return [one(item) for item in given]
    return one(given)
