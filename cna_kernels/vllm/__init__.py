"""A plug-in for vLLM: every request carries its own circuit, and any request may be summed. See ``docs/vllm.md``.

vLLM finds the plug-in by its entry point. An engine takes circuits if it is started with
``additional_config={"cna": {"circuits": ...}}``; the functions below work on such an engine.
"""

from .client import add, circuits, collect, discover, remove, report, sums

__all__ = ["add", "circuits", "collect", "discover", "remove", "report", "sums"]
