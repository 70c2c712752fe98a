"""Stand-ins for what the plug-in meets in vLLM's worker: a model of gated MLPs, and both model runners."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

L, N, H = 3, 70, 24


class Linear(nn.Linear):
    """As vLLM's: ``[T, in] -> ([T, out], None)``; of a rank of tensor parallelism, its part."""

    def __init__(self, n_in, n_out, rank=0, ranks=1):
        super().__init__(n_in, n_out, bias=False)
        self.input_size, self.input_size_per_partition, self.tp_rank = n_in * ranks, n_in, rank

    def forward(self, x):
        return super().forward(x), None


class SiluAndMul(nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class LlamaMLP(nn.Module):
    def __init__(self, rank=0, ranks=1):
        super().__init__()
        self.gate_up_proj, self.act_fn = Linear(H, 2 * N // ranks), SiluAndMul()
        self.down_proj = Linear(N // ranks, H, rank, ranks)

    def forward(self, x):
        x, _ = self.gate_up_proj(x)
        x = self.act_fn(x)
        x, _ = self.down_proj(x)
        return x


class Layer(nn.Module):
    def __init__(self, rank=0, ranks=1):
        super().__init__()
        self.mlp = LlamaMLP(rank, ranks)


class Model(nn.Module):
    """``[T, H] -> [T, H]``: each layer adds what its MLP makes of the stream."""

    def __init__(self, rank=0, ranks=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Layer(rank, ranks) for _ in range(L))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer.mlp(x)
        return x


class Request:
    """A request, and the inputs of its tokens, which stand for its text."""

    def __init__(self, request_id, n_prompt, extra=None, seed=0):
        self.req_id, self.n_prompt = request_id, n_prompt
        self.x = torch.randn(64, H, generator=torch.Generator().manual_seed(seed))
        self.sampling_params = SimpleNamespace(extra_args=extra)
        self.num_prompt_tokens = self.prompt_len = n_prompt


class Runner:
    """A step is a list of (request, first position, tokens). ``finished``: the ids of requests that have ended."""

    def __init__(self, model):
        self.model, self.n_pad = model, 0

    def get_model(self):
        return self.model

    def execute_model(self, scheduler_output, **_):
        step = scheduler_output.step
        self.tell(step)
        x = [request.x[first : first + n] for request, first, n in step]
        x = torch.cat([*x, torch.ones(self.n_pad, H)])
        return self.model(x)

    def run(self, step, finished=()):
        return self.execute_model(SimpleNamespace(step=step, finished_req_ids=set(finished)))


class RunnerV1(Runner):
    def __init__(self, model):
        super().__init__(model)
        self.requests, self.input_batch = {}, None

    def tell(self, step):
        self.requests |= {request.req_id: request for request, *_ in step}
        ids, firsts = [request.req_id for request, *_ in step], np.array([first for _, first, _ in step])
        self.input_batch = SimpleNamespace(req_ids=ids, num_computed_tokens_cpu=firsts)
        self._prepare_inputs(None, np.array([n for *_, n in step], np.int32))

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        pass


class State:
    def add_request(self, req_index, new_req_data):
        pass

    def remove_request(self, req_id):
        pass

    def prepare_inputs(self, input_batch, req_states):
        return {}


class RunnerV2(Runner):
    def __init__(self, model):
        super().__init__(model)
        self.model_state, self.known = State(), set()

    def tell(self, step):
        for request, *_ in step:
            if request.req_id not in self.known and not request.req_id.startswith("dummy"):
                self.known.add(request.req_id)
                self.model_state.add_request(0, request)
        ids, firsts = [request.req_id for request, *_ in step], np.array([first for _, first, _ in step])
        counts = np.array([n for *_, n in step], np.int32)
        batch = SimpleNamespace(req_ids=ids, num_computed_tokens_np=firsts, num_scheduled_tokens=counts)
        self.model_state.prepare_inputs(batch, None)

    def preempt(self, request_id):
        """V2 removes what it preempts, and adds it again."""
        self.known.discard(request_id)
        self.model_state.remove_request(request_id)


def worker_of(runner, max_num_seqs=4):
    """A worker whose model has been loaded."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=L, intermediate_size=N),
            get_layers_start_end_indices=lambda parallel: (0, L),
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=max_num_seqs),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
        parallel_config=None,
    )
    return SimpleNamespace(model_runner=runner, vllm_config=config, device=torch.device("cpu"))
