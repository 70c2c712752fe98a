"""Prompts: prompt files, the corpus of a run, and the columns that count prompts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .files import read_prompts as read_prompts


def __getattr__(name: str) -> object:
    if name == "read_prompts":
        from .files import read_prompts

        return read_prompts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
