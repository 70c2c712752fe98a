"""What runs a model: our own forward pass, or transformers with the engine attached. One is chosen, and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cna_kernels.errors import InputError, warn

from .checkpoint.config import ModelConfig, NotServed
from .checkpoint.formats import read_config
from .checkpoint.gguf_file import is_gguf
from .checkpoint.identity import identity_of
from .checkpoint.load import dtype_of, load_transformer
from .checkpoint.safetensors_file import Checkpoint
from .discovery.streamed import StreamedTransformer
from .packages import missing
from .transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .parallel.lead import Lead

ENGINES = ("auto", "own", "transformers")


class Chosen:
    """The engine of a checkpoint, and its configuration.

    Attributes:
        engine: "own" or "transformers".
        config: ModelConfig, or the HfConfig of a model on transformers.
        hf_config: the configuration as transformers has it; None on our own engine.
    """

    def __init__(self, directory: Path, engine: str = "auto", *, own_only: str | None = None, hf_only: bool = False):
        """
        Args:
            engine: one of ENGINES; "auto" takes our own where it serves the model, else transformers, and says so.
            own_only: an option that only our own engine has, and that was given; hf_only: whether one was given that
                only transformers has.

        Raises:
            InputError: the engine does not serve the model, or lacks the option.
        """
        if engine not in ENGINES:
            raise InputError("engine", f"expected one of {', '.join(ENGINES)}, got {engine!r}")
        self.directory, self.hf_config = directory, None
        self.config: Any
        if engine == "own" and hf_only:
            raise InputError("engine", "device_map and model_args are for the engine transformers")
        if engine != "transformers" and not hf_only:
            try:
                self.engine, self.config = "own", read_config(directory)
                return
            except NotServed as error:
                if engine == "own":
                    raise
                if is_gguf(directory) or (no := missing("transformers")):
                    how = "a GGUF file of this kind is not read" if is_gguf(directory) else f"transformers, {no}"
                    raise InputError(error.where, f"{error.what}; {how}") from None
                reason = f"{error.where}: {error.what}"
                if own_only is None:
                    warn(f"runs on transformers, as our own forward pass does not serve {reason}")
        else:
            reason = "engine: transformers was asked for"
        if own_only is not None:
            raise InputError(own_only, f"is for our own engine ({reason})")
        if is_gguf(directory):
            raise InputError("engine", "expected own for a GGUF file")
        from .hf.hf_config import read_hf_config

        self.engine = "transformers"
        self.config, self.hf_config = read_hf_config(directory)

    def load(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        stream_layers: bool,
        spill: Any,
        mesh: DeviceMesh | Lead | None,
        weights: bool,
        device_map: str | None,
        model_args: Mapping[str, Any] | None,
    ) -> Any:
        """Load the model; the options are those of ``LanguageModel``. Returns what runs it."""
        options: dict[str, Any] = dict(dtype=dtype, device=device)
        if self.hf_config is not None and not weights:
            from .hf.hf_load import recorded
            from .hf.hf_transformer import HfShape

            return HfShape(self.config, device, dtype or dtype_of(self.config, checkpoint), recorded(model_args))
        if self.hf_config is not None:
            from .hf.hf_load import load_hf

            options |= dict(checkpoint=checkpoint, device_map=device_map, model_args=model_args)
            return load_hf(self.directory, self.config, self.hf_config, **options)
        if mesh is not None:
            from .parallel.lead import load_shared

            return load_shared(self.directory, self.config, checkpoint, mesh=mesh, **options)
        if stream_layers or not weights:
            return StreamedTransformer(self.directory, self.config, checkpoint, spill=spill, **options)
        return load_transformer(self.directory, self.config, checkpoint, **options)

    def identity(self, checkpoint: Checkpoint, transformer: Callable[[], Any]) -> dict[str, str]:
        """The name and the hashes of the checkpoint. A model that both engines serve has the same on both."""
        if self.hf_config is None:
            return identity_of(self.directory, checkpoint, self.config)
        from .hf.hf_identity import hf_identity
        from .hf.hf_load import QUANTISE

        on_hf, own = transformer(), _own_config(self.directory)
        if own is not None and QUANTISE not in on_hf.model_args:
            return identity_of(self.directory, checkpoint, own)
        return hf_identity(self.directory, checkpoint, self.config, on_hf)


def _own_config(directory: Path) -> ModelConfig | None:
    """The configuration of a model that our own engine serves; None of others."""
    try:
        return read_config(directory)
    except InputError:
        return None


def require_own(transformer: Any, what: str) -> None:
    """Raise InputError unless a model runs, whole, on our own engine."""
    if type(transformer) is not Transformer:
        raise InputError("engine", f"{what}: the model must be whole, in one process, on our own engine")


def engine_facts(model: Any) -> dict[str, Any]:
    """What a run's manifest says of a LanguageModel's engine; nothing of our own."""
    if model.engine == "own":
        return {}
    return {"engine": model.engine, "model_args": model.transformer.model_args}
