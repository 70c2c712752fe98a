"""The OpenAI server: what JSON hides from the engine is refused, and an answer says what was applied.

vLLM reads ``true`` in ``vllm_xargs`` as 1, keeps unknown fields of a body without a word, and drops all of
``vllm_xargs`` in beam search. The names are looked up here, once, so that the answer speaks of the very circuits that
the request was steered by.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ..errors import InputError
from .hooks import around
from .options import KEY
from .requests import Asked, own_keys, resolve

_FIELD = "vllm_xargs"


def register() -> None:
    """Put the checks around the handlers of the OpenAI server."""
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    around(OpenAIServingCompletion, "create_completion", ["request", "raw_request"], _handle)
    around(OpenAIServingChat, "create_chat_completion", ["request", "raw_request"], _handle)
    around(OpenAIServingResponses, "create_responses", ["request", "raw_request"], _handle)
    around(OpenAIServingChatBatch, "create_batch_chat_completion", ["request", "raw_request"], _refuse)


async def _handle(inner: Any, self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    try:
        asked = await _asked(self, request, raw_request)
    except InputError as error:
        raise VLLMValidationError(str(error)) from None
    answer = await inner(self, request, raw_request, *args, **kwargs)
    if asked is None:
        return answer
    if isinstance(answer, AsyncIterator):
        return _first_says(answer, asked.report())
    if not hasattr(answer, "error"):
        answer.cna = asked.report()
    return answer


async def _refuse(inner: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    if keys := own_keys(getattr(request, _FIELD, None)) | own_keys(request.model_extra):
        raise VLLMValidationError(f"{sorted(keys)[0]}: a batch of chats takes no circuits; send each by itself")
    return await inner(self, request, *args, **kwargs)


async def _asked(handler: Any, request: Any, raw_request: Any) -> Asked | None:
    """What a request asks for. Puts it in the place of the names. Raises InputError."""
    if beside := own_keys(request.model_extra):
        raise InputError(sorted(beside)[0], f"belongs into {_FIELD}, not beside it")
    extra: dict[str, Any] | None = getattr(request, _FIELD, None)
    keys = own_keys(extra)
    if extra is None or not keys:
        return None
    if getattr(request, "use_beam_search", False):
        raise InputError(sorted(keys)[0], "beam search does not hand it on")
    if raw_request is not None and hasattr(raw_request, "json"):
        _refuse_booleans((await raw_request.json()).get(_FIELD))
    asked = resolve(handler.engine_client.input_processor, extra)
    extra[KEY] = asked
    return asked


def _refuse_booleans(given: Any) -> None:
    for name in sorted(own_keys(given)) if isinstance(given, Mapping) else ():
        values = given[name] if isinstance(given[name], list) else [given[name]]
        for value in values:
            if value is None or isinstance(value, bool):
                raise InputError(name, f"expected a name or a number, got {json.dumps(value)}")


async def _first_says(chunks: AsyncIterator[Any], report: dict[str, Any]) -> AsyncIterator[Any]:
    """A stream whose first chunk, and of the responses API every response in it, has one field more, ``cna``."""
    first = True
    async for chunk in chunks:
        if hasattr(chunk, "response"):
            chunk.response.cna = report
        if first and isinstance(chunk, str) and chunk.startswith("data: {"):
            body = json.loads(chunk.removeprefix("data: "))
            if "error" not in body:
                chunk = f"data: {json.dumps({**body, KEY: report})}\n\n"
            first = False
        yield chunk
