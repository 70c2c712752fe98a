"""A checkpoint as transformers loads it, with the engine attached."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cna_kernels import attach
from cna_kernels.errors import InputError, warn
from cna_kernels.fields import short

from ..checkpoint.safetensors_file import Checkpoint
from ..memory import memory_of
from ..packages import require
from .hf_config import HfConfig, in_one_line
from .hf_transformer import HfTransformer

MAX_ROWS = 1 << 16  # the largest batch
# Arguments of from_pretrained that leave the model what its files say, and the one that quantises it.
QUANTISE = "quantization_config"
ARGUMENTS = (
    QUANTISE, "attn_implementation", "experts_implementation", "max_memory", "offload_folder", "offload_state_dict",
    "offload_buffers",
)  # fmt: skip


def load_hf(
    directory: Path,
    config: HfConfig,
    hf_config: Any,
    *,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    device_map: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> HfTransformer:
    """Load a checkpoint by ``from_pretrained``, and attach the engine.

    Args:
        config, hf_config: what ``read_hf_config`` returned. checkpoint: the tensors of the files.
        dtype: of the weights that are not quantised; None keeps the checkpoint's own.
        device_map: as of ``from_pretrained``: "auto" puts layers on all GPUs, and what is left into memory.
        model_args: further arguments of ``from_pretrained``, of ARGUMENTS: others would make another model of the
            files, which nothing would tell from theirs.

    Raises:
        InputError: transformers cannot load the checkpoint, weights are missing in it, or memory cannot hold them.
    """
    import transformers

    given, record = dict(model_args or {}), recorded(model_args)
    if getattr(hf_config, "auto_map", None):
        warn(f"{directory / 'config.json'}: auto_map: its code does not run: transformers' own class does")
    quantised = getattr(hf_config, QUANTISE, None) is not None or QUANTISE in given
    if device_map is None and (quantised or device.type != "cpu"):
        require("accelerate")
        given["device_map"] = {"": str(device)}
    elif device_map is not None:
        require("accelerate")
        given["device_map"] = device_map
    available, needed = memory_of(device), weight_bytes(checkpoint, dtype)
    if device_map is None and not quantised and available is not None and needed > available:
        what = f"needs {needed / 2**30:.1f} GiB for weights, {device} has {available / 2**30:.1f}"
        raise InputError(directory, f"{what}; --device-map auto, in Python device_map, shares it out among devices")
    with in_one_line(directory), quietly():
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        model, found = load(
            directory, trust_remote_code=False, local_files_only=True, use_safetensors=True, output_loading_info=True,
            config=copy.deepcopy(hf_config), dtype="auto" if dtype is None else dtype, **given,
        )  # fmt: skip
        for kind in ("missing_keys", "mismatched_keys"):
            names = sorted(str(name) for name in found[kind])
            if names:
                what = "are missing" if kind == "missing_keys" else "have another shape than config.json says"
                raise InputError(directory, f"{len(names)} of its weights {what}: {short(names[0])}")
        model.eval().requires_grad_(False)
        if quantised:
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(Once())
        engine = attach(model, max_circuits=1, max_entries=1, max_rows=MAX_ROWS)
    return HfTransformer(model, engine, config, record)


def recorded(model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` as JSON has them. Raises InputError for one that is not of ARGUMENTS."""
    for name in model_args or {}:
        if name not in ARGUMENTS:
            raise InputError(f"model_args: {name}", f"expected one of {', '.join(ARGUMENTS)}")
    return {
        name: value.to_dict() if hasattr(value, "to_dict") else json.loads(json.dumps(value, default=str))
        for name, value in sorted((model_args or {}).items())
    }


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    """The bytes of all weights in ``dtype``, None for that of the files; quantised ones stay as they are."""
    total = 0
    for entry in checkpoint.entries.values():
        size = entry.end - entry.start
        total += size if entry.dtype is None or dtype is None else size // entry.dtype.itemsize * dtype.itemsize
    return total


class Once(logging.Filter):
    """Lets each message of a logger through once: some quantised layers log at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars, and without the engine's note on layers that it does not fuse (``cna doctor`` has it)."""
    from transformers.utils import logging as theirs

    bars = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "cna_kernels: exact, but not fused")
            yield
    finally:
        if bars:
            theirs.enable_progress_bar()
