"""Another default dtype of PyTorch (``torch.set_default_dtype``) changes nothing: every tensor is made in a dtype."""

import ast
import subprocess
from pathlib import Path

import pytest
import torch

from cna_kernels import Circuit, SteeringTable, attach
from cna_kernels.model import load
from cna_kernels.model.checkpoint import export, lora
from tiny import write_language_model

ROOT = Path(__file__).resolve().parents[2]
FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "scalar_tensor",
    "tensor", "zeros",
}  # fmt: skip
OF_THEIR_VALUE = {("cna_kernels/engine/rows.py", "torch.as_tensor(value)")}  # a number of any kind, which is checked


def test_every_tensor_is_made_in_a_dtype():
    found, n_calls = set(), 0
    done = subprocess.run(["git", "ls-files", "cna_kernels", "model"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for path in filter(lambda path: path.endswith(".py"), done.stdout.split()):
        text = (ROOT / path).read_text()
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in FACTORIES:
                n_calls += 1
                if not any(keyword.arg == "dtype" for keyword in node.keywords):
                    found.add((path, ast.get_source_segment(text, node)))
    assert n_calls > 80 and found == OF_THEIR_VALUE


POSITIVE, NEGATIVE = ["hi", "hi there", "hi you", "what"], ["one", "two three", "four", "a b c"]


def everything(directory, out):
    """What discovery, steering, sampling, export and attach give, as plain values and tensors."""
    transformers = pytest.importorskip("transformers")
    model = load(directory)
    found = model.discover(positive=POSITIVE, negative=NEGATIVE, top_k=6, score="cohen-d", folds=2, bootstrap=3)
    circuit = Circuit(tuple((0, n, 1.0) for n in range(8)), found.n_layers, found.n_neurons)
    answers = model.generate(POSITIVE, circuit=circuit, multiplier=-2.0, max_new_tokens=6, temperature=1.3, seed=3)
    multipliers = export.neuron_multipliers([circuit], [0.5])
    lora.to_lora(model.checkpoint, model.config, multipliers, out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    engine, ids = attach(theirs), torch.tensor([[3, 4, 5], [6, 7, 8]], dtype=torch.int64)
    engine.set([circuit], [0.3])
    engine.rows([0, -1], start=1)
    with torch.no_grad(), engine.collect([[0.1, 0.0], [0.0, 0.7]], squares=True) as sums:
        logits = theirs(ids).logits
    table = SteeringTable([circuit], [0.1], found.n_layers, found.n_neurons)
    written = {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix == ".safetensors"}
    return found.neurons, answers, written, [logits, sums.total, sums.total_sq, sums.count, *table.layer(0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_another_default_dtype(tmp_path, dtype):
    directory = write_language_model(tmp_path / "llama")
    *expected, tensors = everything(directory, tmp_path / "plain")
    torch.set_default_dtype(dtype)
    try:
        *got, others = everything(directory, tmp_path / "other")
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == expected
    for one, other in zip(tensors, others, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
