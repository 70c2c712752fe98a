"""Circuits over HTTP, where ``VLLM_PLUGINS`` names ``cna_http`` beside ``cna``. vLLM's ``--api-key`` guards the routes.

| route | what |
|---|---|
| ``GET /v1/cna/circuits`` | the names, and how many neurons each circuit has |
| ``PUT /v1/cna/circuits/NAME`` | add or replace a circuit; the body is the JSON of a circuit file |
| ``DELETE /v1/cna/circuits/NAME`` | forget a name |
| ``GET /v1/cna/report`` | what each worker holds and has done |
| ``POST /v1/cna/discover`` | a circuit of what requests have summed: column 0 the positive prompts, 1 the negative |
"""

# No `from __future__ import annotations`: FastAPI reads the annotations of the functions below.

import json
from typing import Any

from ..circuit import Circuit
from ..errors import InputError
from ..fields import Fields
from ..select import Selection
from .client import merged
from .requests import HOW, FrontEnd, front_end_of

_ROUTE = "/v1/cna"


class Endpoint:
    """A vLLM ``EndpointPlugin``."""

    name = "cna_http"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes to the server."""
        from fastapi import HTTPException, Request

        def checked(function: Any, *args: Any) -> Any:
            try:
                return function(*args)
            except InputError as error:
                raise HTTPException(400, str(error)) from None

        @app.get(f"{_ROUTE}/circuits")
        async def listed() -> Any:
            return checked(lambda: _listed(_front(app.state)))

        @app.put(_ROUTE + "/circuits/{name}")
        async def put(name: str, request: Request) -> Any:
            record = await _json(request)
            return checked(_put, app.state, name, record)

        @app.delete(_ROUTE + "/circuits/{name}")
        async def delete(name: str) -> Any:
            return checked(_delete, app.state, name)

        @app.get(f"{_ROUTE}/report")
        async def report() -> Any:
            checked(_front, app.state)
            return await app.state.cna_engine.collective_rpc("cna_report")

        @app.post(f"{_ROUTE}/discover")
        async def discover(request: Request) -> Any:
            selection, reset = checked(_selection, _front(app.state), await _json(request))
            parts = await app.state.cna_engine.collective_rpc("cna_sums", args=(reset,))
            return checked(_discovered, _front(app.state), selection, parts)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Remember the engine."""
        state.cna_engine = engine_client
        state.cna_servers = getattr(args, "api_server_count", None) or 1


async def _json(request: Any) -> Any:
    from fastapi import HTTPException

    try:
        return await request.json()
    except ValueError:
        raise HTTPException(400, "body: is no JSON") from None


def _front(state: Any) -> FrontEnd:
    front = None if state.cna_engine is None else front_end_of(state.cna_engine.input_processor)
    if front is None:
        raise InputError("cna", f"this engine takes no circuits: {HOW}")
    return front


def _listed(front: FrontEnd) -> dict[str, Any]:
    return {"circuits": {name: {"n_neurons": front.registry.get(name).k} for name in front.registry.names()}}


def _put(state: Any, name: str, record: Any) -> dict[str, Any]:
    front = _writable(state)
    circuit = Circuit.from_record(record, name, n_layers=front.n_layers, n_neurons=front.n_neurons)
    front.registry.put(name, circuit)
    return _listed(front)


def _delete(state: Any, name: str) -> dict[str, Any]:
    front = _writable(state)
    front.registry.remove(name)
    return _listed(front)


def _writable(state: Any) -> FrontEnd:
    front = _front(state)
    if state.cna_servers > 1 and not isinstance(front.options.circuits, str):
        raise InputError("circuits", "several API servers share circuits by a directory alone: give one as `circuits`")
    return front


def _selection(front: FrontEnd, record: Any) -> tuple[Selection, bool]:
    fields = Fields(record, "body")
    chosen = {
        "fraction": fields.number("fraction", (0.0, 1.0), 0.001),
        "top_k": fields.integer("top_k", (1, front.n_layers * front.n_neurons), None),
        "score": fields.one_of("score", ("abs-delta", "magnitude"), "abs-delta"),
    }
    reset = fields.boolean("reset", True)
    fields.only((*chosen, "reset"), "a discovery")
    return Selection([front.n_neurons] * front.n_layers, **chosen), reset


def _discovered(front: FrontEnd, selection: Selection, parts: Any) -> Any:
    found = merged(front, parts)
    if len(found.count) != 2 or not all(found.count):
        raise InputError("columns", f"expected prompts in two columns, got {found.count.tolist()}")
    circuit = selection.circuit(found, position="last prompt token", **front.provenance())
    return json.loads(circuit.to_json())
