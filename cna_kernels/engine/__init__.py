"""The engine on a transformers model: ``attach`` puts it there, ``Engine`` is what it returns."""

from .attach import attach as attach
from .attach import attached as attached
from .engine import Engine as Engine
