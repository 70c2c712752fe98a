"""A checkpoint in either format: a directory in Hugging Face layout, or a GGUF file."""

from __future__ import annotations

import os

from cna_kernels.errors import InputError
from cna_kernels.files import FilePath

from . import config, safetensors_file
from .config import ModelConfig
from .gguf_file import is_gguf
from .gguf_model import open_gguf, read_gguf_config
from .safetensors_file import Checkpoint


def require_checkpoint(path: FilePath) -> None:
    """Raise InputError unless the path is a directory or a GGUF file."""
    if not os.path.isdir(path) and not is_gguf(path):
        raise InputError(path, "is neither a directory with a checkpoint nor a .gguf file")


def read_config(path: FilePath) -> ModelConfig:
    """Read and check ``config.json``, or the metadata of a GGUF file.

    Raises:
        InputError: naming the file and the field that is missing, out of range or not supported.
    """
    return read_gguf_config(path) if is_gguf(path) else config.read_config(path)


def open_checkpoint(path: FilePath) -> Checkpoint:
    """Read where each tensor of a checkpoint lies, from the headers alone.

    Raises:
        InputError: a file is missing, truncated or malformed.
    """
    return open_gguf(path) if is_gguf(path) else safetensors_file.open_checkpoint(path)
