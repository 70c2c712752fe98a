"""What the OpenAI server's JSON hides from the engine, and what its answers say."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from cna_kernels import Circuit, InputError
from cna_kernels.vllm import http
from cna_kernels.vllm.requests import Asked

L, N = 2, 64
CONFIG = SimpleNamespace(model="m", hf_text_config=SimpleNamespace(num_hidden_layers=L, intermediate_size=N))


@pytest.fixture
def handler(tmp_path):
    Circuit(((0, 3, 1.0), (1, 4, 1.0)), L, N).save(tmp_path / "one.json")
    options = {"cna": {"circuits": {"one": str(tmp_path / "one.json")}}}
    processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=options, model_config=CONFIG))
    return SimpleNamespace(engine_client=SimpleNamespace(input_processor=processor))


def ask(handler, xargs, *, beam=False, sent=None, **beside):
    """``xargs`` as the server has read them, ``sent`` as the client wrote them."""

    async def read():
        return {"vllm_xargs": xargs if sent is None else sent}

    request = SimpleNamespace(vllm_xargs=xargs, use_beam_search=beam, model_extra=beside or None)
    found = asyncio.run(http._asked(handler, request, SimpleNamespace(json=read)))
    return found, request


def test_names_are_looked_up_once(handler):
    asked, request = ask(handler, {"cna_circuit": "one", "cna_multiplier": 0.5, "top": 1})
    assert isinstance(asked, Asked) and request.vllm_xargs["cna"] is asked and len(asked.setting.layer) == 2
    assert ask(handler, {"top": 1})[0] is None and ask(handler, None)[0] is None
    again = asyncio.run(http._asked(handler, request, None))
    assert again is asked, "what it was resolved to then, whatever the name means now"


REFUSED = [
    ("cna_circuit: belongs into vllm_xargs, not beside it", dict(xargs=None, cna_circuit="one")),
    ("cna_multiplier: belongs into vllm_xargs", dict(xargs={"cna_circuit": "one"}, cna_multiplier=0)),
    ("cna_circuit: beam search does not hand it on", dict(xargs={"cna_circuit": "one"}, beam=True)),
    (
        "cna_multiplier: expected a name or a number, got false",
        dict(xargs={"cna_circuit": "one", "cna_multiplier": 0}, sent={"cna_circuit": "one", "cna_multiplier": False}),
    ),
    (
        "cna_multiplier: expected a name or a number, got true",
        dict(xargs={"cna_circuit": ["one"], "cna_multiplier": [1]}, sent={"cna_multiplier": [True]}),
    ),
    ("cna_circuit: no circuit 'two'; known are one", dict(xargs={"cna_circuit": "two"})),
]  # fmt: skip


@pytest.mark.parametrize(("said", "sent"), REFUSED, ids=[said for said, _ in REFUSED])
def test_what_json_hides_is_refused(handler, said, sent):
    with pytest.raises(InputError) as caught:
        ask(handler, **sent)
    assert said in str(caught.value)


def test_the_first_chunk_of_a_stream_says_what_was_applied():
    async def chunks():
        yield 'data: {"id": "x", "choices": []}\n\n'
        yield 'data: {"id": "x", "choices": [1]}\n\n'
        yield "data: [DONE]\n\n"

    async def read():
        return [chunk async for chunk in http._first_says(chunks(), {"n_neurons": 2})]

    first, second, last = asyncio.run(read())
    assert json.loads(first.removeprefix("data: ")) == {"id": "x", "choices": [], "cna": {"n_neurons": 2}}
    assert "cna" not in second and last == "data: [DONE]\n\n" and first.endswith("\n\n")
