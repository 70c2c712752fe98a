"""The plug-in in vLLM: each case in a process of its own; what it found becomes a row of `docs/serving.md`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rows import record
from vllm_cases import CASES, TOLERANCE, Work

HERE = Path(__file__).parent


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_case(work, case):
    command = [sys.executable, str(HERE / "vllm_cases.py"), case, str(work)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    record("vLLM plug-in", json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def server(work):
    """vLLM's OpenAI server with the plug-in: the front end, the engine and the worker in processes of their own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = {
        "cna": {"circuits": {"c0": str(work / "circuits" / "c0.json"), "c3": str(work / "circuits" / "c3.json")}}
    }
    options["cna"]["columns"] = 2
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(work / "model"),
        "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--max-model-len", "512", "--dtype", "float32", "--max-num-seqs", "16", "--block-size", "32",
        "--additional-config", json.dumps(options),
    ]  # fmt: skip
    own = {"VLLM_PLUGINS": "cna,cna_http", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(work / "server.log", "w") as log:
        started = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log)
        try:
            for _ in range(300):
                assert started.poll() is None, (work / "server.log").read_text()[-4000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            yield Client(port)
        finally:
            started.terminate()
            started.wait(60)


class Client:
    """Requests to the server: the parsed answer, or the error as (status, text)."""

    def __init__(self, port):
        self.port = port

    def call(self, path, body=None, method=None, raw=False):
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", content, headers, method=method)
        try:
            text = urllib.request.urlopen(request, timeout=600).read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        return text if raw else json.loads(text)

    def complete(self, ids, xargs=None, raw=False, **changes):
        body = {
            "model": "model", "prompt": ids, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0,
            "return_token_ids": True, **changes,
        }  # fmt: skip
        return self.call("/v1/completions", body | ({} if xargs is None else {"vllm_xargs": xargs}), raw=raw)


def test_concurrent_requests(work, server):
    """24 at a time, each with its circuit: tokens and log-probabilities of the model one at a time."""
    reference = Work(work)
    asked = [(place, name, m) for name, m in [(None, 1.0), ("c0", 0.0), ("c3", -1.0)] for place in range(8)]

    def run(each):
        place, name, m = each
        return server.complete(reference.prompts[place], name and {"cna_circuit": name, "cna_multiplier": m})

    with ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(run, asked))
    worst = 0.0
    for answer, (place, name, m) in zip(answers, asked, strict=True):
        assert isinstance(answer, dict), answer
        tokens, expected = reference.answers[f"{name} {m}"][place]
        choice = answer["choices"][0]
        assert choice["token_ids"] == tokens, (place, name, m)
        got = choice["logprobs"]["token_logprobs"]
        worst = max(worst, *(abs(a - b) for a, b in zip(got, expected, strict=True)))
        assert (answer.get("cna") or {}).get("circuits") == (name and [{"circuit": name, "multiplier": m}])
    assert worst < TOLERANCE
    tokens = sum(len(answer["choices"][0]["token_ids"]) for answer in answers)
    record("vLLM plug-in", {"case": "server", "requests": 24, "tokens": tokens, "max_logprob_difference": worst})


BAD = {
    "no circuit 'c9'": ({"cna_circuit": "c9"}, {}),
    "cna_circut: is unknown": ({"cna_circut": "c0"}, {}),
    "got true": ({"cna_circuit": "c0", "cna_multiplier": True}, {}),
    "got false": ({"cna_circuit": ["c0"], "cna_multiplier": [False]}, {}),
    "expected a finite number, got '0'": ({"cna_circuit": "c0", "cna_multiplier": "0"}, {}),
    "expected a finite number, got 1e+300": ({"cna_circuit": "c0", "cna_multiplier": 1e300}, {}),
    "beam search": ({"cna_circuit": "c0"}, {"use_beam_search": True, "n": 2, "logprobs": None}),
    "belongs into vllm_xargs": (None, {"cna_circuit": "c0"}),
    "cna_column: expected 0 to 1": ({"cna_column": 7}, {}),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_requests_get_400_and_a_line(work, server, said):
    prompt, (xargs, changes) = Work(work).prompts[0], BAD[said]
    status, text = server.complete(prompt, xargs, max_tokens=1, **changes)
    assert status == 400 and said in text, (status, text)
    assert server.complete(prompt, max_tokens=1)["choices"], "the server goes on"


def test_answers_say_what_was_applied(work, server):
    reference = Work(work)
    xargs = {"cna_circuit": "c0", "cna_multiplier": 0.5}
    stream = server.complete(reference.prompts[0], xargs, raw=True, stream=True)
    first, *rest = [
        json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line.startswith("data: {")
    ]
    assert first["cna"]["circuits"] == [{"circuit": "c0", "multiplier": 0.5}] and not any(
        "cna" in each for each in rest
    )
    chat = {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "vllm_xargs": xargs}
    assert server.call("/v1/chat/completions", chat)["cna"]["n_neurons"] == 92
    assert '"cna"' in server.call("/v1/chat/completions", {**chat, "stream": True}, raw=True).partition("\n\n")[0]
    response = {"model": "model", "input": "Hello", "max_output_tokens": 4, "vllm_xargs": xargs}
    assert server.call("/v1/responses", response)["cna"]["n_neurons"] == 92


def test_circuits_over_http(work, server):
    reference = Work(work)
    circuit = json.loads((work / "circuits" / "c8.json").read_text())
    assert server.call("/v1/cna/circuits/c8", circuit, "PUT")["circuits"]["c8"] == {"n_neurons": 92}
    got = server.complete(reference.prompts[0], {"cna_circuit": "c8", "cna_multiplier": -1.0})
    assert got["choices"][0]["token_ids"] == reference.answers["c8 -1.0"][0][0]
    assert "c8" not in server.call("/v1/cna/circuits/c8", None, "DELETE")["circuits"]
    assert server.complete(reference.prompts[0], {"cna_circuit": "c8"})[0] == 400
    for body in (
        {},
        [],
        {**circuit, "n_neurons": 1537},
        {**circuit, "model": {"name": "x", "decoder_sha256": "0" * 64}},
    ):
        assert server.call("/v1/cna/circuits/c8", body, "PUT")[0] == 400
    assert sorted(server.call("/v1/cna/circuits")["circuits"]) == ["c0", "c3"]


def test_discovery_from_live_traffic(work, server):
    reference = Work(work)
    for place, column in [(0, 0), (1, 1), (4, 0), (5, 1)]:
        server.complete(reference.prompts[place], {"cna_column": column}, max_tokens=1)
    found = server.call("/v1/cna/discover", {"top_k": 30})
    assert len(found["neurons"]) == 30 and found["model"]["decoder_sha256"]
    assert server.call("/v1/cna/discover", {"top_k": 30})[0] == 400, "the sums began anew"
    assert server.call("/v1/cna/circuits/found", found, "PUT")["circuits"]["found"] == {"n_neurons": 30}
    server.call("/v1/cna/circuits/found", None, "DELETE")
