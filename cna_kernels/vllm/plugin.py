"""The entry point ``vllm.general_plugins``: what is put around vLLM's functions, in every process of an engine.

| process | function of vLLM | what for |
|---|---|---|
| front end | ``EngineArgs.create_engine_config`` | checks options and vLLM, refuses what does not go together |
| front end | ``InputProcessor.process_inputs`` | names become neurons; the salt of the prefix cache |
| front end | ``OutputProcessor.add_request``, ``RequestState._new_request_output`` | ``output.cna``: what was applied |
| front end | ``LLMEngine.add_request``, ``AsyncLLM.add_request`` | the workers have the plug-in, and the same one |
| HTTP | ``create_completion``, ``create_chat_completion``, ``create_responses`` | see ``http.py`` |
| worker | ``Worker.load_model`` | puts the plug-in on the model |

``vllm`` is imported when the plug-in registers; an engine that is started without the plug-in's options is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .hooks import Changed, around
from .options import KEY, STAMP, options_of, read, stamp, with_stamp
from .requests import FrontEnd, front_end_of, own_keys, resolve, salt_of_others

TESTED = ("0.32.",)  # the beginnings of the versions of vLLM that ``make test-engines`` has run with


def register() -> None:
    """Put the plug-in around vLLM's functions. vLLM calls it once in every process; more calls change nothing.

    Raises:
        Changed: a function of vLLM is not there, or has other parameters than it had when the plug-in was tested.
    """
    from vllm.engine.arg_utils import EngineArgs

    around(EngineArgs, "create_engine_config", [], _create_engine_config)
    try:
        _register_all()
    except (Changed, ImportError, AttributeError) as error:
        _NOT_REGISTERED.append(str(error))  # an engine with the plug-in's options will not start; others will


_NOT_REGISTERED: list[str] = []


def _register_all() -> None:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase

    request = ["request_id", "prompt", "params"]
    around(InputProcessor, "process_inputs", request, _process_inputs)
    around(LLMEngine, "add_request", request, _add_request)
    around(AsyncLLM, "add_request", request, _add_request_async)
    around(OutputProcessor, "add_request", ["request"], _remember)
    around(RequestState, "_new_request_output", ["external_req_id", "outputs", "finished"], _new_request_output)
    around(Worker, "load_model", [], _load_model)
    RequestOutput.cna = None
    for name, function in (("cna_report", _report), ("cna_sums", _sums)):
        setattr(WorkerBase, name, function)
    from . import http

    http.register()


def _version() -> str:
    from vllm import __version__

    return str(__version__)


# The front end


def _create_engine_config(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    given = getattr(self, "additional_config", None)
    if not isinstance(given, dict) or given.get(KEY) is None:
        return inner(self, *args, **kwargs)
    options, version = read(given[KEY]), _version()
    if not version.startswith(TESTED) and not options.any_version:
        known = ", ".join(f"{each}x" for each in TESTED)
        raise Changed(f'cna: vLLM {version} is not tested, {known} is; "any_version": true takes it all the same')
    if _NOT_REGISTERED:
        raise Changed(_NOT_REGISTERED[0])
    self.additional_config = with_stamp(given)
    config = inner(self, *args, **kwargs)
    if wrong := _does_not_go(config, options.columns):
        raise InputError("cna", f"does not work with {', '.join(wrong)}")
    FrontEnd(options, config.model_config)  # a file that is no circuit of this model ends the start
    return config


def _does_not_go(config: Any, columns: int) -> list[str]:
    """What an engine is started with that the plug-in was not built for."""
    parallel, speculative = config.parallel_config, config.speculative_config
    return [
        name
        for name, found in {
            "dual-batch overlap": parallel.use_ubatching,
            "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
            "decode context parallelism": parallel.decode_context_parallel_size > 1,
            "a KV connector (kv_transfer_config)": config.kv_transfer_config is not None,
            "an encoder connector (ec_transfer_config)": getattr(config, "ec_transfer_config", None) is not None,
            "pooling": config.model_config.runner_type != "generate",
            "adaptive verification": getattr(speculative, "enable_adaptive_verification", False),
            "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
            "columns and data parallelism": columns > 0 and parallel.data_parallel_size > 1,
        }.items()
        if found
    ]


def _process_inputs(inner: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError  # over HTTP 400; any other error is a 500 without its text

    try:
        asked = resolve(self, getattr(params, "extra_args", None))
    except InputError as error:
        raise VLLMValidationError(str(error)) from None
    if asked is not None and asked.column is not None and params.n > 1:
        raise VLLMValidationError(f"cna_column: {params.n} answers (n) would count the prompt as often; ask for one")
    request = inner(self, request_id, prompt, params, *args, **kwargs)
    if asked is None:
        if front_end_of(self) is not None:
            request.cache_salt = salt_of_others(request.cache_salt)
        return request
    if request.resumable:
        raise VLLMValidationError("cna_circuit: a streaming session keeps the salt of its first part; send one prompt")
    prompt_of = request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids
    request.cache_salt = asked.salted(request.cache_salt, len(prompt_of))
    own = request.sampling_params  # a copy of the caller's
    own.extra_args = {**own.extra_args, KEY: asked.record()}
    return request


def _remember(inner: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    found = inner(self, request, *args, **kwargs)
    record = (getattr(request.sampling_params, "extra_args", None) or {}).get(KEY)
    state = self.request_states.get(request.request_id)
    if isinstance(record, dict) and state is not None:
        state.cna = record["report"]
    return found


def _new_request_output(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    output = inner(self, *args, **kwargs)
    output.cna = getattr(self, KEY, None)
    return output


def _add_request(inner: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    if _must_know_workers(self, prompt, params):
        try:
            reports = self.collective_rpc("cna_report")
        except Exception as error:
            raise Changed(_NO_WORKERS.format(error)) from None
        _check_workers(self, reports)
    return inner(self, request_id, prompt, params, *args, **kwargs)


async def _add_request_async(
    inner: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    if _must_know_workers(self, prompt, params):
        try:
            reports = await self.collective_rpc("cna_report")
        except Exception as error:
            raise Changed(_NO_WORKERS.format(error)) from None
        _check_workers(self, reports)
    return await inner(self, request_id, prompt, params, *args, **kwargs)


_NO_WORKERS = "cna: the engine's workers run without the plug-in: install cna-kernels where they run ({})"


def _must_know_workers(engine: Any, prompt: Any, params: Any) -> bool:
    """Whether a request asks for something, and nobody has seen yet that the workers have the plug-in."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine import EngineCoreRequest

    made = prompt if isinstance(prompt, EngineCoreRequest) else None
    extra = getattr(params if made is None else made.sampling_params, "extra_args", None)
    if not own_keys(extra):
        return False
    if made is not None and extra is not None and not isinstance(extra.get(KEY), dict):
        raise VLLMValidationError("cna_circuit: the request did not go through InputProcessor.process_inputs")
    return front_end_of(engine.input_processor) is not None and not getattr(engine, "_cna_workers", None)


def _check_workers(engine: Any, reports: Sequence[dict[str, Any]]) -> None:
    """Raise Changed unless every layer of the model has a worker with this version of the plug-in."""
    front = front_end_of(engine.input_processor)
    assert front is not None
    if any(report[STAMP] != stamp() for report in reports):
        raise Changed("cna: the engine's workers run another version of the plug-in")
    covered = {layer for report in reports for layer in report["layers"]}
    if covered != set(range(front.n_layers)):
        raise Changed(f"cna: {len(covered)} of {front.n_layers} layers are steered")
    engine._cna_workers = True


# The worker


def _load_model(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    found = inner(self, *args, **kwargs)
    options = options_of(self.vllm_config)
    if options is not None:
        from .worker import Steering

        if hasattr(self, "cna"):  # its rows would be told to the first one alone
            raise Changed("cna: this worker has loaded a model before; start another engine")
        if options.stamp != stamp():
            raise Changed("cna: this worker has another version of the plug-in than the front end")
        self.cna = Steering(self, options)
    return found


def _report(self: Any) -> dict[str, Any]:
    found: dict[str, Any] = self.cna.report()
    return found


def _sums(self: Any, reset: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = self.cna.totals(reset)
    return found
