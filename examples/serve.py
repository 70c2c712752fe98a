"""A serving loop with continuous batching, where every request brings its own circuit and multiplier.

    python examples/serve.py [MODEL]

MODEL is a directory in Hugging Face layout; default the bundled model, for which the prompts here are made.

A slot is a row of the batch and of the cache. A request waits for a free slot, its prompt is run alone into the slot's
part of the cache, and from then on it decodes one token a step together with the requests in the other slots. The
request's circuit has the slot's number in the live table, so that a request comes and goes without anything being
rebuilt. Any thread may submit; one thread steps.
"""

import copy
import queue
import sys
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from cna_kernels import Circuit, SteeringTable
from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.demo import world
from cna_kernels.model.prompts.files import PromptSet
from cna_kernels.model.transformer import KVCache, Steering


@dataclass
class Request:
    prompt: str
    circuit: Circuit | None = None
    multiplier: float = 1.0
    max_new_tokens: int = 40
    ids: list[int] = field(default_factory=list)  # prompt and answer so far
    n_prompt: int = 0
    answer: Future = field(default_factory=Future)  # the text, or the error of the request


class Server:
    def __init__(self, model, n_slots=8, context=256):
        self.model, self.transformer, self.config = model, model.transformer, model.config
        layers, neurons = self.config.num_hidden_layers, self.config.intermediate_size
        self.table = SteeringTable([], [], layers, neurons, model.device, max_circuits=n_slots)
        self.cache = KVCache(self.config, n_slots, context, self.transformer.dtype, model.device)
        self.row_circuit = torch.full((n_slots,), -1, dtype=torch.int32, device=model.device)
        self.slots: list[Request | None] = [None] * n_slots
        self.waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def submit(self, request: Request) -> Future:
        self.waiting.put(request)
        return request.answer

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit what fits, decode one token of every request; return whether there was anything to do."""
        for slot, request in enumerate(self.slots):
            while request is None and not self.waiting.empty():
                request = self.admit(slot, self.waiting.get())
        if not any(self.slots):
            return False
        ends = torch.tensor([len(request.ids) if request else 1 for request in self.slots], device=self.model.device)
        ids = torch.tensor([[request.ids[-1] if request else 0] for request in self.slots], device=self.model.device)
        self.cache.used = int(ends.max()) - 1  # the call adds one token
        steer = Steering(self.table, self.row_circuit)
        hidden = self.transformer.hidden(ids, lengths=ends, positions=ends[:, None] - 1, cache=self.cache, steer=steer)
        self.take(dict(enumerate(self.transformer.logits(hidden[:, 0]).argmax(-1).tolist())))
        return True

    def admit(self, slot: int, request: Request) -> Request | None:
        """Run a request's prompt into a slot. One that cannot be served gets the reason; the slot then stays free."""
        if not request.answer.set_running_or_notify_cancel():  # nobody waits for the answer any more
            return None
        try:
            if request.max_new_tokens < 1:
                raise ValueError(f"max_new_tokens: expected at least 1, got {request.max_new_tokens}")
            prompt = self.model.encode(PromptSet.of([request.prompt], "prompt"))[0]
            request.ids, request.n_prompt = list(prompt.ids), len(prompt.ids)
            if request.n_prompt + request.max_new_tokens > self.cache.keys.shape[3]:
                raise ValueError(f"prompt and answer are longer than {self.cache.keys.shape[3]} tokens")
            if request.circuit is not None:
                self.table.replace(slot, request.circuit, request.multiplier)
        except ValueError as error:
            request.answer.set_exception(error)
            return None
        self.row_circuit[slot] = -1 if request.circuit is None else slot
        own = copy.copy(self.cache)  # the slot's part of the same memory
        own.keys, own.values = self.cache.keys[:, slot : slot + 1], self.cache.values[:, slot : slot + 1]
        own.rows, own.used = own.rows[:1], 0
        steer = Steering(self.table, self.row_circuit[slot : slot + 1])
        hidden = self.transformer.hidden(torch.tensor([request.ids], device=self.model.device), cache=own, steer=steer)
        self.slots[slot] = request
        self.take({slot: int(self.transformer.logits(hidden[:, -1]).argmax())})
        return self.slots[slot]

    def take(self, chosen: dict[int, int]):
        """Add each slot's next token; free the slots of the requests that end with it."""
        for slot, token in chosen.items():
            request = self.slots[slot]
            if request is None:
                continue
            ended = token in self.model.stop_ids
            if not ended:
                request.ids.append(token)
            answer = request.ids[request.n_prompt :]
            if ended or len(answer) == request.max_new_tokens:
                request.answer.set_result(self.model.tokenizer.decode(answer))
                self.slots[slot], self.row_circuit[slot] = None, -1
                if request.circuit is not None:
                    self.table.remove(slot)


if __name__ == "__main__":
    model = load(sys.argv[1] if len(sys.argv) > 1 else demo_checkpoint("instruct"))
    refusal = model.discover(world.discovery_positive(), world.discovery_negative(), score="magnitude")
    server, prompts = Server(model, n_slots=3), world.heldout_refusable()[:2] + world.heldout_benign()[:1]
    requests = [Request(p, refusal, m) for p in prompts for m in (1.0, 0.0)] + [Request(prompts[0])]
    answers = [server.submit(request) for request in requests]
    while server.step():
        pass
    for request, answer in zip(requests, answers, strict=True):
        circuit = f"m = {request.multiplier:g}" if request.circuit is not None else "no circuit"
        print(f"{circuit:10}  {request.prompt}\n            {answer.result()}")
