"""A minimal Llama / Qwen / Mistral on the ops of ``cna_kernels``; and what needs a model: text, discovery, the CLI.

This module imports nothing heavy; each name loads its module on first use.
"""

from importlib import import_module

TYPE_CHECKING = False  # as typing has it; importing typing takes longer than all else that `cna` does before main

_HOME = {
    "load": "language_model",
    "LanguageModel": "language_model",
    "read_prompts": "prompts.files",
    "demo_checkpoint": "demo.checkpoint",
}

__all__ = list(_HOME)


if TYPE_CHECKING:  # as in cna_kernels/__init__.py
    from .demo.checkpoint import demo_checkpoint as demo_checkpoint
    from .language_model import LanguageModel as LanguageModel
    from .language_model import load as load
    from .prompts.files import read_prompts as read_prompts
else:

    def __getattr__(name):
        if name in _HOME:
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
