"""What an evaluation depends on, and where it ran."""

from __future__ import annotations

import platform
import time

import torch

import cna_kernels
from cna_kernels.circuit import Circuit
from cna_kernels.files import sha256

from ..engines import engine_facts
from ..language_model import LanguageModel
from . import directions
from .suite import Suite


def environment(model: LanguageModel) -> dict:
    """Versions and machine."""
    device = model.device
    return {
        "cna_kernels": cna_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "ranks": model.transformer.n_ranks,
        "date": time.strftime("%Y-%m-%d"),
    }


def model_facts(model: LanguageModel, chat: bool | None = None) -> dict:
    """What a model's answers depend on besides prompts and circuits; ``chat`` as in ``LanguageModel.encode``."""
    return {
        "model": model.identity()
        | {"tokenizer_sha256": model.tokenizer.sha256, "chat_template_sha256": model.tokenizer.template_sha256},
        "chat": model.encoder.record(chat),
        **engine_facts(model),
        "device": model.device.type,
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "versions": {"cna_kernels": cna_kernels.__version__, "torch": torch.__version__},
    }


def run_facts(model: LanguageModel, circuit: Circuit, suite: Suite) -> dict:
    """What an evaluation's results depend on, for the store's manifest."""
    feature = None
    if suite.sae is not None:
        row = directions.read_decoder_row(*suite.sae[:2], model.config.hidden_size)
        feature = sha256(row.numpy().tobytes())
    own = {"circuit_sha256": sha256(circuit.to_json()), "suite": suite.facts(), "sae_row_sha256": feature}
    return model_facts(model, suite.chat) | own
