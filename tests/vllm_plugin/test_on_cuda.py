"""The plug-in on a GPU: a graph that was captured once steers and sums what each step asks for. Skipped without one."""

import pytest
import torch
from fakes import H, Model, Request, RunnerV1, RunnerV2, worker_of
from test_worker import extra, last_acts, scaled

from cna_kernels.vllm import act
from cna_kernels.vllm.options import Options
from cna_kernels.vllm.worker import Steering

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
N_ROWS = 16


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield
    act._Current.state = None


class Captured:
    """A model whose forward of N_ROWS rows is one CUDA graph."""

    def __init__(self, model):
        self.x = torch.zeros(N_ROWS, H, device="cuda")
        for _ in range(2):
            model(self.x)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.y = model(self.x)

    def __call__(self, x):
        self.x.copy_(x)
        self.graph.replay()
        return self.y.cpu()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])
def test_a_captured_graph_steers_and_sums_every_step(kind, fused, monkeypatch):
    monkeypatch.setattr(act, "is_fused", lambda act, device: fused)
    model = Model()
    runner = kind(model.cuda())
    worker = worker_of(runner)
    worker.device = torch.device("cuda")
    steering = Steering(worker, Options({}, columns=2))
    captured = Captured(runner.model)
    runner.model = captured
    plain = Model()
    given = {"plain": None, "ablated": extra(0, column=1), "twice": extra(0, 2.0), "second": extra(1, -1.0, column=0)}
    requests = {name: Request(name, 6, each, seed) for seed, (name, each) in enumerate(given.items())}
    answers = {
        "plain": plain, "ablated": scaled(plain, 0, 0.0), "twice": scaled(plain, 0, 2.0),
        "second": scaled(plain, 1, -1.0),
    }  # fmt: skip
    steps = [
        [("plain", 0, 6), ("ablated", 0, 4)],
        [("plain", 6, 1), ("ablated", 4, 2), ("twice", 0, 6)],
        [("second", 0, 6), ("plain", 7, 1), ("twice", 6, 1)],
        [("plain", 8, 2)],
    ]
    for step in steps:
        runner.n_pad = N_ROWS - sum(n for *_, n in step)
        got, at = runner.run([(requests[name], first, n) for name, first, n in step]), 0
        for name, first, n in step:
            x = requests[name].x[first : first + n]
            torch.testing.assert_close(got[at : at + n], answers[name](x), rtol=1e-4, atol=1e-4, msg=f"{step}: {name}")
            assert answers[name] is plain or (got[at : at + n] - plain(x)).abs().max() > 0.01
            at += n
        torch.testing.assert_close(got[at:], plain(torch.ones(runner.n_pad, H)), rtol=1e-4, atol=1e-4)
    assert steering.sums.count.tolist() == [1, 1]
    columns = [last_acts(answers[name], requests[name]) for name in ("second", "ablated")]
    torch.testing.assert_close(steering.sums.total.cpu(), torch.stack(columns, dim=1), rtol=1e-4, atol=1e-4)
