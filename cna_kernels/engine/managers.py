"""What the engine looks for in transformers' continuous batching, where it is private, and changes at times."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import InputError

COMPLETE = ("mark_complete_blocks", "mark_shareable_blocks_as_complete")  # the cache's, in one version or another
# (class, the names of a method, of which one must be there, and one of its parameters)
METHODS = (
    ("ContinuousBatchingManager", ("_create_batch_processor",), None),
    ("ContinuousBatchingManager", ("add_request",), "request_id"),
    ("ContinuousBatchingManager", ("add_requests",), "inputs"),
    ("ContinuousBatchProcessor", ("prepare_next_batch",), None),
    ("ContinuousBatchProcessor", ("_generation_step",), "model"),
    ("ContinuousBatchingIOs", ("prepare_batch_tensors",), "requests_in_batch"),
    ("ContinuousBatchingAsyncIOs", ("prepare_batch_tensors",), "requests_in_batch"),
    ("Scheduler", ("add_waiting_request",), "state"),
    ("PagedAttentionCache", ("search_prefix_match",), "prompt_ids"),
    ("PagedAttentionCache", COMPLETE, "state"),
)
FIELDS = ("request_id", "initial_tokens", "generated_tokens", "position_offset", "_true_initial_tokens")


def check_known(manager: Any) -> None:
    """Raise InputError unless a manager, and what it will make, have the parts that the engine watches."""
    own = [kind for kind in type(manager).__mro__ if kind.__name__ == "ContinuousBatchingManager"]
    module = sys.modules.get(own[0].__module__) if own else None
    missing = next(_missing(module), None)
    if missing is not None:
        version = getattr(sys.modules.get("transformers"), "__version__", "of no version")
        what = f"transformers {version} has no {missing}, by which requests are told apart"
        raise InputError("init_continuous_batching", what)


def _missing(module: Any) -> Iterator[str]:
    for kind, names, parameter in METHODS:
        found = [getattr(getattr(module, kind, None), name, None) for name in names]
        method = next(filter(callable, found), None)
        if method is None or (parameter is not None and parameter not in inspect.signature(method).parameters):
            yield f"{kind}.{names[0]}"
    fields = getattr(getattr(module, "RequestState", None), "__dataclass_fields__", {})
    yield from (f"RequestState.{name}" for name in FIELDS if name not in fields)


def is_running(manager: Any) -> bool:
    """Whether the thread of a manager is at work."""
    return manager is not None and bool(manager.is_running())
