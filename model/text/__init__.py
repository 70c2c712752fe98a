"""Text to token ids and back, and chat templates."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> object:
    if name == "Tokenizer":
        from .tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
