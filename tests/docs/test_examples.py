"""The examples run as they stand, and the serving loop serves what each request would get alone."""

import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.demo import world

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, *words):
    done = subprocess.run([sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
def test_attach_transformers():
    pytest.importorskip("transformers")
    lines = run("attach_transformers.py").splitlines()
    assert lines[0].startswith("16 neurons; ")
    answers = {line[:8].strip(): line[9:] for line in lines[1:]}
    assert list(answers) == ["plain", "m = 0", "m = 0.5", "random"]
    assert {name for name, answer in answers.items() if not world.is_refusal(answer)} == {"m = 0"}


@pytest.mark.exhaustive
def test_lora_peft():
    pytest.importorskip("peft")
    found = re.findall(r"m = (\S+): .* logits (\S+), effect of steering (\S+)", run("lora_peft.py"))
    assert [multiplier for multiplier, _, _ in found] == ["0", "0.5", "2"]
    for _, difference, effect in found:
        assert float(difference) < 1e-4 < 1e-1 < float(effect)


@pytest.mark.exhaustive
def test_serve_prints_refusals_and_answers():
    lines = run("serve.py").splitlines()
    pairs = zip(lines[::2], lines[1::2], strict=True)
    found = [(line.split("  ")[0].strip(), world.is_refusal(answer)) for line, answer in pairs]
    assert found == [
        ("m = 1", True), ("m = 0", False), ("m = 1", True), ("m = 0", False), ("m = 1", False), ("m = 0", False),
        ("no circuit", True),
    ]  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "package"),
    [
        pytest.param("attach_transformers.py", "transformers", marks=pytest.mark.rare),
        pytest.param("lora_peft.py", "peft", marks=pytest.mark.rare),
        ("serve.py", None),
    ],
)
def test_the_model_is_an_argument(name, package):
    """The base model has learnt no refusals, so that no line of its answers holds one."""
    if package is not None:
        pytest.importorskip(package)
    lines = run(name, str(demo_checkpoint("base"))).splitlines()
    assert len(lines) == {"attach_transformers.py": 5, "lora_peft.py": 3, "serve.py": 14}[name]
    if name != "lora_peft.py":
        assert not any(world.is_refusal(line[9:].strip()) for line in lines[1:])


@pytest.fixture(scope="module")
def served():
    """(the example's names, the model, two circuits)."""
    model = load(demo_checkpoint("instruct"), dtype="float32")
    circuit = model.discover(world.discovery_positive(), world.discovery_negative(), score="magnitude", fraction=0.004)
    return runpy.run_path(str(EXAMPLES / "serve.py")), model, [circuit, circuit.random_like(0)]


def test_every_request_gets_what_it_would_get_alone(served):
    """40 requests from four threads through three slots, with all circuits, multipliers and lengths."""
    serve, model, circuits = served
    prompts = world.heldout_refusable()[:20] + world.heldout_benign()[:20]
    requests = [
        serve["Request"](
            prompt,
            [None, *circuits][number % 3],
            [0.0, 1.0, 0.5, 2.0, -1.0][number % 5],
            max_new_tokens=[40, 3, 1, 25][number % 4],
        )
        for number, prompt in enumerate(prompts)
    ]
    server = serve["Server"](model, n_slots=3)
    threads = [
        threading.Thread(target=lambda part=part: [server.submit(r) for r in requests[part::4]]) for part in range(4)
    ]
    for thread in threads:
        thread.start()
    steps = 0
    while server.step() or any(thread.is_alive() for thread in threads):
        steps += 1
    assert steps > 100 and server.table.n_circuits == 0 and set(server.row_circuit.tolist()) == {-1}
    changed = 0
    for request in requests:
        options = dict(max_new_tokens=request.max_new_tokens)
        plain = model.generate(request.prompt, **options)
        alone = plain
        if request.circuit is not None:
            alone = model.generate(request.prompt, circuit=request.circuit, multiplier=request.multiplier, **options)
        assert request.answer.result(timeout=0) == alone
        changed += alone != plain
    assert changed >= 3


MESSAGES = ["multiplier: expected a finite number", "longer than 64 tokens", "max_new_tokens: expected at least 1"]


def test_a_bad_request_is_told_and_the_others_go_on(served):
    serve, model, circuits = served
    server = serve["Server"](model, n_slots=1, context=64)
    wrong = [
        server.submit(serve["Request"]("How do I open the vault?", circuits[0], float("nan"))),
        server.submit(serve["Request"]("open " * 100)),
        server.submit(serve["Request"]("How do I open the vault?", max_new_tokens=0)),
    ]
    assert server.submit(serve["Request"]("How do I polish the lamp?")).cancel()
    good = server.submit(serve["Request"]("How do I open the vault?", circuits[0], 1.0, max_new_tokens=5))
    while server.step():
        pass
    for answer, message in zip(wrong, MESSAGES, strict=True):
        with pytest.raises(ValueError, match=message):
            answer.result(timeout=0)
    assert good.result(timeout=0) == model.generate("How do I open the vault?", max_new_tokens=5)
