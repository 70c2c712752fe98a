"""The plug-in in a worker, on both model runners, against scaled weights and hooks on the input of ``down_proj``."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fakes import H, L, Model, N, Request, RunnerV1, RunnerV2, worker_of

from cna_kernels import Circuit, InputError
from cna_kernels.errors import InputWarning
from cna_kernels.vllm import act, plugin
from cna_kernels.vllm.client import merged
from cna_kernels.vllm.hooks import Changed
from cna_kernels.vllm.options import Options, stamp
from cna_kernels.vllm.setting import setting_of
from cna_kernels.vllm.worker import Steering, Step

CIRCUITS = [
    Circuit(tuple((layer, (7 * layer + 11 * c + i) % N, 1.0) for layer in range(L) for i in range(4)), L, N)
    for c in range(4)
]
RUNNERS = pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])


@pytest.fixture(params=[False, True], ids=["in place", "swiglu"])
def fused(request, monkeypatch):
    """Both of what may stand in an activation's place; on CPUs vLLM's own stays."""
    monkeypatch.setattr(act, "is_fused", lambda act, device: request.param)
    return request.param


def extra(circuit=None, m=0.0, column=None, phase="both"):
    setting = None if circuit is None else setting_of([CIRCUITS[circuit]], [m])
    return {"cna": {"setting": setting and setting.record(), "phase": phase, "column": column, "report": {}}}


def scaled(model, circuit, m):
    """The model with the columns of ``down_proj`` scaled."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for layer, index in CIRCUITS[circuit].pairs:
            plain.layers[layer].mlp.down_proj.weight[:, index] *= m
    return plain


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield
    act._Current.state = None


def start(kind, model, columns=0, **options):
    runner = kind(copy.deepcopy(model))
    return runner, Steering(worker_of(runner), Options({}, columns=columns, **options))


@RUNNERS
def test_every_row_has_its_own_circuit(kind, fused):
    """Mixed steps of prompts, pieces of prompts and answers, with and without circuits, and padding behind them."""
    model = Model()
    runner, steering = start(kind, model)
    given = {"plain": None, "other": {"top": 1}, "ablated": extra(0), "twice": extra(0, 2.0), "second": extra(1, -1.0)}
    requests = {name: Request(name, 6, each, seed) for seed, (name, each) in enumerate(given.items())}
    answers = {
        "plain": model, "other": model, "ablated": scaled(model, 0, 0.0), "twice": scaled(model, 0, 2.0),
        "second": scaled(model, 1, -1.0),
    }  # fmt: skip
    steps = [
        [("plain", 0, 6), ("ablated", 0, 4)],
        [("plain", 6, 1), ("ablated", 4, 2), ("twice", 0, 6)],
        [("second", 0, 3), ("plain", 7, 1), ("twice", 6, 1), ("other", 0, 5)],
        [("plain", 8, 1), ("other", 5, 2)],
        [("ablated", 6, 3)],
        [("plain", 9, 1)],
    ]
    for pad, step in enumerate(steps):
        runner.n_pad = pad
        got = runner.run([(requests[name], first, n) for name, first, n in step])
        whole = model(
            torch.cat([*(requests[name].x[first : first + n] for name, first, n in step), torch.ones(pad, H)])
        )
        at = 0
        for name, first, n in step:
            x = requests[name].x[first : first + n]
            torch.testing.assert_close(got[at : at + n], answers[name](x), msg=f"{step}: {name}")
            if answers[name] is model:
                assert fused or torch.equal(got[at : at + n], whole[at : at + n]), "the very bits"
            else:
                assert (got[at : at + n] - model(x)).abs().max() > 0.01, "steering without effect would hide everything"
            at += n
        torch.testing.assert_close(got[at:], model(torch.ones(pad, H)), msg="padding is unsteered")
    assert steering.report()["settings"] == 3 and steering.n_steered == 4 + 2 + 6 + 3 + 1 + 3


@RUNNERS
def test_a_phase_ends_or_begins_with_the_prompt(kind):
    """In steps of one piece of a prompt, of its end and drafts behind it, and of one token."""
    model = Model()
    runner, steering = start(kind, model)
    ways = [("prompt", 0, 0.0), ("answer", 1, 2.0), ("both", 2, -1.0), ("answer", 0, 0.0)]
    requests = [Request(str(i), 6, extra(c, m, phase=phase), i) for i, (phase, c, m) in enumerate(ways)]
    for step in ([(0, 4)] * 4, [(4, 2)] * 4, [(0, 6), (3, 5), (6, 1), (5, 4)], [(7, 1), (8, 3), (7, 1), (5, 1)]):
        got, at = runner.run([(r, first, n) for r, (first, n) in zip(requests, step, strict=True)]), 0
        for (phase, c, m), request, (first, n) in zip(ways, requests, step, strict=True):
            for position in range(first, first + n):
                steered = phase == "both" or (phase == "prompt") == (position < 6)
                x = request.x[position : position + 1]
                expected = scaled(model, c, m)(x) if steered else model(x)
                torch.testing.assert_close(got[at : at + 1], expected, msg=f"{step}: {phase} at {position}")
                at += 1
    assert steering.n_steered == (4 + 0 + 4 + 0) + (2 + 0 + 2 + 0) + (6 + 2 + 1 + 3) + (0 + 3 + 1 + 0)


@RUNNERS
def test_more_settings_over_time_than_the_table_holds(kind):
    model = Model()
    runner, steering = start(kind, model)
    for step in range(30):
        batch = [(c, round(0.1 * ((step * 3 + c) % 17), 3)) for c in range(4)]
        requests = [Request(f"{step} {c}", 2, extra(c, m), step) for c, m in batch]
        got = runner.run([(request, 0, 2) for request in requests])
        for place, (c, m) in enumerate(batch):
            torch.testing.assert_close(got[2 * place : 2 * place + 2], scaled(model, c, m)(requests[place].x[:2]))
    assert len(steering.slots) <= 8


def last_acts(model, request):
    """The input of every ``down_proj`` at the last token of a prompt, ``[L, N]``."""
    found, x = [], request.x[: request.n_prompt]
    for layer in model.layers:
        acts = layer.mlp.act_fn(layer.mlp.gate_up_proj(x)[0])
        found.append(acts[-1])
        x = x + layer.mlp.down_proj(acts)[0]
    return torch.stack(found).double()


@RUNNERS
def test_the_last_prompt_token_counts_once(kind, fused):
    """In pieces, beside others, after a preemption that runs the prompt again, and while a dummy batch runs."""
    model = Model()
    runner, steering = start(kind, model, columns=2)
    a, b, c = (Request(name, n, extra(column=i), n) for name, n, i in (("a", 5, 0), ("b", 7, 1), ("c", 3, 0)))
    other = Request("other", 4, extra(0, 2.0), 9)
    runner.run([(a, 0, 5), (b, 0, 4)])
    if kind is RunnerV2:
        runner.preempt("b")
    runner.run([(a, 5, 1), (b, 0, 6), (other, 0, 4)])
    runner.run([(b, 6, 1), (c, 0, 3), (a, 6, 1)])
    if kind is RunnerV2:
        runner.preempt("a")
        runner.run([(Request("dummy", 4, None, 1), 0, 4)])
    runner.run([(a, 0, 7)])
    assert steering.sums.count.tolist() == [2, 1]
    expected = torch.stack([last_acts(model, a) + last_acts(model, c), last_acts(model, b)], dim=1)
    torch.testing.assert_close(steering.sums.total, expected, rtol=1e-5, atol=1e-5)
    runner.run([(other, 4, 1)], finished=["a", "b", "c"])
    again = Request("a", 5, extra(column=0), 5)
    if kind is RunnerV2:
        runner.preempt("a")
    runner.requests = {}
    runner.run([(again, 0, 5)])
    assert steering.sums.count.tolist() == [3, 1], "another request may have the name of one that has ended"
    found = steering.totals(reset=True)
    assert found["count"] == [3, 1] and steering.sums.count.tolist() == [0, 0] and not steering.sums.total.any()


@RUNNERS
def test_activations_that_are_not_finite_are_in_no_sum(kind):
    model = Model()
    runner, steering = start(kind, model, columns=1)
    good, bad = Request("good", 2, extra(column=0)), Request("bad", 2, extra(column=0), 3)
    bad.x[1, 0] = float("nan")
    runner.run([(good, 0, 2)])
    before = steering.sums.total.clone()
    with pytest.warns(InputWarning, match="non-finite activation in layer 0"):
        runner.run([(bad, 0, 2)])
    assert torch.equal(steering.sums.total, before) and before.any() and steering.sums.count.tolist() == [1]
    assert steering.totals(reset=False)["refused"] == steering.report()["refused"] == ["bad"]


def test_ranks_of_tensor_parallelism_have_their_shards():
    """The sums of two ranks are the model's; each scales its own neurons."""
    whole, parts = Model(), []
    for rank in (0, 1):
        half = Model(rank, 2)
        low = rank * N // 2
        for mine, full in zip(half.layers, whole.layers, strict=True):
            gate, up = full.mlp.gate_up_proj.weight.chunk(2)
            rows = torch.cat([gate[low : low + N // 2], up[low : low + N // 2]])
            mine.mlp.gate_up_proj.weight.copy_(rows)
            mine.mlp.down_proj.weight.copy_(full.mlp.down_proj.weight[:, low : low + N // 2])
        parts.append(start(RunnerV1, half, columns=2))
    given, x = extra(2, 3.0, column=1), torch.randn(3, H)
    outs = []
    for runner, steering in parts:  # the first layer alone: there is nobody to reduce the others' outputs
        steering.begin([Step("a", given["cna"], 3, 0, 3)])
        outs.append(runner.model.layers[0].mlp(x))
        steering.end()
    steered = scaled(whole, 2, 3.0).layers[0].mlp
    torch.testing.assert_close(sum(outs), steered(x))
    assert (sum(outs) - whole.layers[0].mlp(x)).abs().max() > 0.01
    front = SimpleNamespace(n_layers=L, n_neurons=N)
    found = merged(front, [steering.totals(False) for _, steering in parts])
    mlp = whole.layers[0].mlp
    expected = mlp.act_fn(mlp.gate_up_proj(x)[0])[-1].double()
    torch.testing.assert_close(found.total[0, 1], expected, rtol=1e-5, atol=1e-5)
    assert not found.total[:, 0].any() and found.count.tolist() == [0, 1]
    totals = [steering.totals(False) for _, steering in parts]
    totals[1] |= {"count": [0, 0], "refused": ["bad"]}
    with pytest.raises(
        InputError, match=r"sums: activations that are not finite, of some workers' neurons alone \(bad\)"
    ):
        merged(front, totals)


def test_a_worker_steers_one_model():
    """A second model would be steered by nobody, and nobody would say so."""
    worker = worker_of(RunnerV1(Model()))
    worker.vllm_config.additional_config = {"cna": {"stamp": stamp()}}
    plugin._load_model(lambda worker: None, worker)
    assert worker.cna.layers == [0, 1, 2]
    with pytest.raises(Changed, match="has loaded a model before"):
        plugin._load_model(lambda worker: None, worker)
    other = worker_of(RunnerV1(Model()))
    other.vllm_config.additional_config = {"cna": {"stamp": "of another version"}}
    with pytest.raises(Changed, match="another version of the plug-in"):
        plugin._load_model(lambda worker: None, other)


@pytest.mark.parametrize(
    ("device", "name", "module", "backend", "expected"),
    [
        ("cuda", "SiluAndMul", "vllm.model_executor.layers.activation", "triton", True),
        ("cuda", "SiluAndMul", "vllm.model_executor.layers.activation", "reference", False),
        ("cpu", "SiluAndMul", "vllm.model_executor.layers.activation", "cpu", False),
        ("cuda", "GeluAndMul", "vllm.model_executor.layers.activation", "triton", False),
        ("cuda", "SiluAndMul", "another.package", "triton", False),
    ],
)
def test_swiglu_stands_only_for_silu_and_mul_on_a_gpu(device, name, module, backend, expected, monkeypatch):
    monkeypatch.setattr(act.backends, "name_for", lambda device: backend)
    activation = type(name, (), {"__module__": module})()
    assert act.is_fused(activation, torch.device(device)) is expected


def test_compiled_layers_see_every_step(fused):
    """One graph, whatever is steered: the state is looked up when it runs."""
    model = Model()
    runner, _ = start(RunnerV1, model)
    torch._dynamo.reset()
    plain, runner.model = runner.model, torch.compile(runner.model, fullgraph=True, backend="aot_eager", dynamic=True)
    runner.get_model = lambda: plain
    with torch._dynamo.config.patch(error_on_recompile=False):
        for m in (0.0, 2.0, 1.0):
            request = Request(str(m), 5, extra(0, m) if m != 1 else None)
            got = runner.run([(request, 0, 5)])
            torch.testing.assert_close(got, scaled(model, 0, m)(request.x[:5]))


def test_equal_layers_are_one_graph(fused):
    """A layer's number is no constant of its graph: an engine that compiles layer by layer would compile each."""
    runner, _ = start(RunnerV1, Model())
    codes = []

    def keep(graph, inputs):
        codes.append(graph.code)
        return graph.forward

    for layer in runner.model.layers:
        torch._dynamo.reset()
        torch.compile(layer.mlp, backend=keep, fullgraph=True)(torch.randn(3, H))
    assert len(codes) == L and len(set(codes)) == 1 and "vllm_" in codes[0]
