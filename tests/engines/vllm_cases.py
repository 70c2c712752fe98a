"""The plug-in in vLLM, held against the model one prompt at a time: one case a process.

    python vllm_cases.py CASE DIRECTORY     prints one JSON object: what the case found

A case raises where a token or a log-probability is wrong. ``cases.py`` has written the directory. CNA_ENGINE_OPTIONS
may hold further options of every engine, as JSON: on a GPU its share of the memory, say.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
    TORCHINDUCTOR_COMPILE_THREADS="1", VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
)  # fmt: skip
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
TOLERANCE = 5e-4  # of a log-probability in fp32: vLLM's attention and softmax are not those of the reference
EFFECT = 5e-3  # what a circuit changes of a log-probability at least, somewhere in an answer


class Work:
    """The directory: prompts, settings, and what the model says."""

    def __init__(self, directory):
        self.directory = Path(directory)
        record = json.loads((self.directory / "reference.json").read_text())
        self.prompts, self.answers = record["prompts"], record["answers"]
        self.settings = []
        for key in self.answers:
            name, multiplier = key.split()
            self.settings.append((None if name == "None" else name, float(multiplier)))
        self.circuits = {path.stem: str(path) for path in sorted((self.directory / "circuits").glob("*.json"))}

    def engine(self, *, cna=None, **changes):
        """A vLLM engine that takes the circuits."""
        from vllm import LLM

        options = {"circuits": self.circuits, "columns": 2, **(cna or {})}
        given = dict(
            model=str(self.directory / "model"), dtype="float32", enforce_eager=True, max_model_len=512,
            max_num_seqs=32, max_num_batched_tokens=96, block_size=32, disable_log_stats=True,
            additional_config={"cna": options},
            skip_tokenizer_init=not (self.directory / "model" / "tokenizer.json").exists(),
        )  # fmt: skip
        return LLM(**{**given, **json.loads(os.environ.get("CNA_ENGINE_OPTIONS", "{}")), **changes})

    def run(self, llm, work, *, n_tokens=None, lora=None):
        """Outputs for (prompt, name, multiplier) in one batch."""
        prompts = [{"prompt_token_ids": self.prompts[place]} for place, *_ in work]
        params = [sampling(name, m, n_tokens) for _, name, m in work]
        return llm.generate(prompts, params, use_tqdm=False, **({} if lora is None else {"lora_request": lora}))

    def check(self, outputs, work):
        """Raise unless every output is the reference's. Return the greatest difference of a log-probability.

        Tokens may differ where the reference's two best are as good as equal: the log-probability up to there counts.
        """
        worst, n_equal = 0.0, 0
        for output, (place, name, m) in zip(outputs, work, strict=True):
            tokens, expected = self.answers[f"{name} {m}"][place]
            got = list(output.outputs[0].token_ids)
            logprobs = logprobs_of(output)
            n = len(got)
            assert got == tokens[:n], f"prompt {place}, {name} at {m}: {got} instead of {tokens[:n]}"
            n_equal += n
            difference = max(abs(a - b) for a, b in zip(logprobs, expected[:n], strict=True))
            assert difference < TOLERANCE, f"prompt {place}, {name} at {m}: log-probabilities differ by {difference}"
            worst = max(worst, difference)
            assert (output.cna is None) == (name is None)
            if name is not None:
                assert output.cna["circuits"] == [{"circuit": name, "multiplier": m}] and output.cna["n_neurons"] == 92
        return {"tokens": n_equal, "requests": len(work), "max_logprob_difference": worst}

    def effect(self, name, m, place):
        """How far a setting moves the log-probabilities of an answer, up to where its tokens differ."""
        (tokens, steered), (plain, base) = self.answers[f"{name} {m}"][place], self.answers["None 1.0"][place]
        n = next((i for i, (a, b) in enumerate(zip(tokens, plain, strict=True)) if a != b), len(tokens) - 1)
        return max(abs(a - b) for a, b in zip(steered[: n + 1], base[: n + 1], strict=True))


def logprobs_of(output):
    """The log-probability of each token of an answer."""
    answer = output.outputs[0]
    return [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]


def sampling(name=None, m=1.0, n_tokens=None, **extra):
    from vllm import SamplingParams

    if name is not None:
        extra |= {"cna_circuit": name, "cna_multiplier": m}
    n = n_tokens or 24
    return SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=0, extra_args=extra or None)


def mixed(work):
    """32 requests with 16 circuits in flight, and plain ones among them; prompts in pieces of at most 96 tokens."""
    llm = work.engine(max_num_seqs=40, enable_prefix_caching=False)
    batch = [(place, name, m) for name, m in work.settings for place in (0, 5)]
    found = work.check(work.run(llm, batch), batch)
    steered = [(name, m, place) for place, name, m in batch if name]
    least = min(work.effect(*each) for each in steered)
    assert least > EFFECT, f"a circuit that changes nothing shows nothing: {least}"
    import cna_kernels.vllm as plugin

    report = plugin.report(llm)[0]
    n_steered = sum(len(work.prompts[place]) + 24 - 1 for _, _, place in steered)
    assert report["settings"] == 16 and report["steered_tokens"] == n_steered, report
    return found | {"circuits": 16, "least_effect": least}


def prefix(work):
    """The prefix cache: no request reads the keys and values of another setting, and equal settings share theirs."""
    llm = work.engine(enable_prefix_caching=True)
    found, hits = {"max_logprob_difference": 0.0, "tokens": 0}, 0
    for turn in range(2):  # cold, then warm
        for name, m in [(None, 1.0), ("c0", 0.0), ("c3", -1.0), (None, 1.0), ("c8", -1.0)]:
            for place in (4, 5, 6):
                outputs = work.run(llm, [(place, name, m)])
                each = work.check(outputs, [(place, name, m)])
                found["max_logprob_difference"] = max(found["max_logprob_difference"], each["max_logprob_difference"])
                found["tokens"] += each["tokens"]
                hits += outputs[0].num_cached_tokens
                if turn:
                    assert outputs[0].num_cached_tokens >= 128, "a setting reads what it has written itself"
    from cna_kernels.vllm import requests

    # the test can fail: without a salt the next plain request reads steered keys and values
    kept, requests.Asked.salted = requests.Asked.salted, lambda self, salt, n_prompt: salt
    llm.reset_prefix_cache()
    work.run(llm, [(4, "c0", 0.0)])
    wrong = work.run(llm, [(4, None, 1.0)], n_tokens=1)[0]
    requests.Asked.salted = kept
    effect = abs(logprobs_of(wrong)[0] - work.answers["None 1.0"][4][1][0])
    assert wrong.num_cached_tokens >= 128 and effect > 100 * TOLERANCE, f"without a salt: {effect}"
    return found | {"requests": 30, "cached_tokens": hits, "wrong_by_without_salt": effect}


def preempted(work):
    """A cache with room for a few requests: they are preempted and run again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    count, inner = [0], Scheduler._preempt_request

    def counted(*args, **kwargs):
        count[0] += 1
        return inner(*args, **kwargs)

    Scheduler._preempt_request = counted
    llm = work.engine(num_gpu_blocks_override=24)
    batch = [(place, name, m) for name, m in work.settings[:6] for place in (0, 4)]
    found = work.check(work.run(llm, batch), batch)
    assert count[0] > 0, "nothing was preempted"
    return found | {"preemptions": count[0]}


def speculative(work):
    """Drafts by n-grams belong to their request."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = work.engine(speculative_config=ngram)
    batch = [(place, name, m) for name, m in work.settings[:6] for place in (0, 4)]
    return work.check(work.run(llm, batch), batch)


def compiled(work):
    """torch.compile with Inductor, which vLLM uses by default; then again from its cache."""
    llm = work.engine(enforce_eager=False)
    batch = [(place, name, m) for name, m in work.settings[:6] for place in (0, 4)]
    found = work.check(work.run(llm, batch), batch)
    mode = llm.llm_engine.vllm_config.compilation_config.mode
    assert int(mode) != 0, mode
    return found | {"mode": str(mode)}


def quantised(work):
    """Weights of 4 bits (compressed-tensors, groups of 32), products in bf16; the reference is their exact values.

    Log-probabilities scatter as bf16 products do: those of steered requests no more than those of plain ones, and far
    less than the circuits move them.
    """
    import torch
    from cases import write_quantised

    from cna_kernels import Circuit
    from cna_kernels.model import load

    packed, exact = work.directory / "packed", work.directory / "exact"
    write_quantised(work.directory / "model", packed, exact)
    os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # its products would round the activations to 8 bits
    llm = work.engine(model=str(packed), dtype="bfloat16", cna={"any_model": True})
    batch = [(place, name, m) for name, m in [(None, 1.0), ("c0", 0.0), ("c3", -1.0)] for place in range(4)]
    model, scatter, effect = load(exact, dtype="float32"), {}, []
    for output, (place, name, m) in zip(work.run(llm, batch), batch, strict=True):
        prompt, tokens = work.prompts[place], list(output.outputs[0].token_ids)

        def expected(multiplier, circuit=work.circuits[name or "c0"], prompt=prompt, tokens=tokens):
            with torch.inference_mode(), model.steered(circuit=Circuit.load(circuit), multiplier=multiplier):
                scores = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].double()
            return scores.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

        right = expected(m)
        scatter.setdefault(name, []).append((torch.tensor(logprobs_of(output)) - right).abs().mean().item())
        if name is not None:
            effect.append((expected(1.0) - right).abs().mean().item() / scatter[name][-1])
    mean = {name: sum(each) / len(each) for name, each in scatter.items()}
    assert max(mean["c0"], mean["c3"]) < 2 * mean[None] and mean[None] < 0.05, mean
    assert sum(effect) / len(effect) > 4, effect
    return {"requests": len(batch), "mean_logprob_difference": max(mean["c0"], mean["c3"]), "of_plain": mean[None]}


def phases(work):
    """Requests that steer their prompt or their answer alone, beside each other; then again from the prefix cache.
    The reference is transformers' model, attached."""
    import torch
    from transformers import AutoModelForCausalLM

    from cna_kernels import Circuit, attach

    asked = [(place, m, phase) for place in (0, 4) for m, phase in ((0.0, "prompt"), (-1.0, "answer"), (-1.0, "both"))]
    prompts = [{"prompt_token_ids": work.prompts[place]} for place, *_ in asked]
    params = [sampling("c0", m, cna_phase=phase) for _, m, phase in asked]
    model = AutoModelForCausalLM.from_pretrained(work.directory / "model", dtype=torch.float32)
    engine = attach(model)
    expected, worst = [], 0.0
    for place, m, phase in asked:
        engine.set([Circuit.load(work.circuits["c0"])], [m])
        engine.rows(0, phase=phase)
        ids = torch.tensor([work.prompts[place]])
        logits = dict(return_dict_in_generate=True, output_logits=True, eos_token_id=-1, pad_token_id=0)
        found = model.generate(ids, max_new_tokens=24, do_sample=False, **logits)
        scores = torch.cat(found.logits).double().log_softmax(-1)
        expected.append((found.sequences[0, ids.shape[1] :].tolist(), scores.max(-1).values.tolist()))
    assert expected[1][0] != expected[2][0], "phases without effect would hide everything"
    llm = work.engine()
    for _ in range(2):
        for output, (tokens, logprobs), (*_, phase) in zip(
            llm.generate(prompts, params, use_tqdm=False), expected, asked, strict=True
        ):
            assert list(output.outputs[0].token_ids) == tokens and output.cna["phase"] == phase
            worst = max(worst, *(abs(a - b) for a, b in zip(logprobs_of(output), logprobs, strict=True)))
    assert worst < TOLERANCE, worst
    return {"requests": 2 * len(asked), "tokens": 48 * len(asked), "max_logprob_difference": worst}


def tensor_parallel(work):
    """Three ranks, each with its third of the neurons, in processes of their own."""
    llm = work.engine(tensor_parallel_size=3, max_num_seqs=16)
    batch = [(place, name, m) for name, m in work.settings[:6] for place in (0, 4)]
    found = work.check(work.run(llm, batch), batch)
    import cna_kernels.vllm as plugin

    reports = plugin.report(llm)
    assert [(each["low"], each["n"]) for each in reports] == [(0, 512), (512, 512), (1024, 512)], reports
    return found | sums(work, llm)


def lora(work):
    """Beside vLLM's own LoRA: adapters that `cna export` writes are the circuits, and both go into one batch.

    Its base rows are wrong where every slot holds an adapter (vLLM 0.32 on a CPU), so one slot more is made.
    """
    from vllm.lora.request import LoRARequest

    from cna_kernels.model.cli import main

    adapters = {}
    for number, (name, m, form) in enumerate([("c0", 0.0, ()), ("c3", -1.0, ("--for", "vllm"))], 1):
        out = work.directory / f"lora-{name}"
        circuit = work.circuits[name]
        assert not main(
            ["export", str(work.directory / "model"), "-c", circuit, f"-m={m}", "--to", "lora", *form, "-o", str(out)]
        )
        adapters[name] = LoRARequest(name, number, str(out))
    llm = work.engine(enable_lora=True, max_loras=3, max_lora_rank=64)
    batch = [(place, name, m) for name, m in work.settings[:4] for place in (0, 4)]
    found = work.check(work.run(llm, batch), batch)
    asked = [
        (0, "c0", 0.0, True),
        (0, "c3", -1.0, True),
        (0, "c0", 0.0, False),
        (0, None, 1.0, False),
        (4, "c0", 0.0, True),
    ]
    plain = [(place, None if adapted else name, m) for place, name, m, adapted in asked]
    chosen = [adapters[name] if adapted else None for _, name, _, adapted in asked]
    worst = 0.0
    for output, (place, name, m, _) in zip(work.run(llm, plain, lora=chosen), asked, strict=True):
        tokens, expected = work.answers[f"{name} {m}"][place]
        assert list(output.outputs[0].token_ids) == tokens, (place, name, m)
        worst = max(worst, *(abs(a - b) for a, b in zip(logprobs_of(output), expected, strict=True)))
    assert worst < TOLERANCE, worst
    return found | {"max_logprob_difference": max(worst, found["max_logprob_difference"]), "requests": len(batch) + 5}


def runner_v2(work):
    """The model runner that is the default on GPUs; its Triton kernels run in Triton's interpreter."""
    llm = work.engine(max_num_seqs=8, max_model_len=320)
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert isinstance(worker.model_runner, GPUModelRunner)
    batch = [(place, name, m) for name, m in work.settings[:4] for place in (0,)]
    found = work.check(work.run(llm, batch, n_tokens=6), batch)
    for each in [(4, name, m) for name, m in work.settings[:2] for _ in range(2)]:  # the second reads the prefix cache
        work.check(work.run(llm, [each], n_tokens=2), [each])
    return found | sums(work, llm, places=((0, 2), (1,)))


def sums(work, llm=None, places=((0, 4, 6), (1, 5))):
    """Discovery: sums of the last prompt tokens, and the circuit that they give, are those of the model by itself."""
    import torch

    import cna_kernels.vllm as plugin

    own = llm is None
    llm = llm or work.engine()
    sets = [[work.prompts[place] for place in each] for each in places]
    found = plugin.collect(llm, *[[{"prompt_token_ids": ids} for ids in each] for each in sets])
    assert found.count.tolist() == [len(each) for each in places]
    expected = torch.zeros_like(found.total)
    for column, each in enumerate(sets):
        for ids in each:
            expected[:, column] += last_acts(work.directory / "model", ids)
    error = (found.total - expected).abs().max().item()
    assert error < 1e-4 * expected.abs().max().item(), error
    circuit = plugin.discover(llm, *[[{"prompt_token_ids": ids} for ids in each] for each in sets], top_k=50)
    mean = expected[:, 0] / len(places[0]) - expected[:, 1] / len(places[1])
    best = mean.abs().flatten().topk(50).indices.tolist()
    assert {layer * 1536 + index for layer, index in circuit.pairs} == set(best)
    if own:
        plugin.add(llm, "found", circuit)
        output = llm.generate([{"prompt_token_ids": work.prompts[0]}], sampling("found", 0.0), use_tqdm=False)[0]
        assert output.cna["n_neurons"] == 50
        plain = llm.generate([{"prompt_token_ids": work.prompts[0]}], sampling(), use_tqdm=False)[0]
        assert output.outputs[0].token_ids != plain.outputs[0].token_ids
        plugin.remove(llm, "found")
        for _ in range(2):  # the last token counts once, however the prompt was cut and cached
            plugin.collect(llm, *[[{"prompt_token_ids": ids} for ids in each] for each in sets])
    return {"sums_error": error / expected.abs().max().item()}


def last_acts(directory, ids):
    """The input of every ``down_proj`` at the last token, ``[L, N]`` fp64, by hooks on transformers' model."""
    import torch
    from transformers import AutoModelForCausalLM

    found = []
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][0, -1].double()))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    return torch.stack(found)


def live(work):
    """Circuits added, replaced and removed between and beside requests; several in one request; refusals."""
    import cna_kernels.vllm as plugin
    from cna_kernels import Circuit, InputError

    llm = work.engine(cna={"circuits": {"c0": work.circuits["c0"]}})
    before = work.run(llm, [(0, "c0", 0.0)])
    work.check(before, [(0, "c0", 0.0)])
    plugin.add(llm, "c8", work.circuits["c8"])
    work.check(work.run(llm, [(0, "c8", -1.0)]), [(0, "c8", -1.0)])
    swapped = Circuit.load(work.circuits["c8"])
    plugin.add(llm, "c0", swapped)  # the name means another circuit, whose keys and values are others
    outputs = work.run(llm, [(4, "c0", -1.0)])
    tokens = work.answers["c8 -1.0"][4][0]
    assert list(outputs[0].outputs[0].token_ids) == tokens
    plugin.add(llm, "c0", work.circuits["c0"])
    both = sampling(["c0", "c8"], [0.0, -1.0])
    one = llm.generate([{"prompt_token_ids": work.prompts[0]}], both, use_tqdm=False)[0]
    assert one.cna["n_neurons"] == 184 and len(one.cna["circuits"]) == 2
    none = llm.generate([{"prompt_token_ids": work.prompts[0]}], sampling(["c0", "c8"], 1.0), use_tqdm=False)[0]
    assert list(none.outputs[0].token_ids) == work.answers["None 1.0"][0][0]
    assert list(one.outputs[0].token_ids) != list(none.outputs[0].token_ids)
    plugin.remove(llm, "c8")
    refused = []
    for extra in (
        {"cna_circuit": "c8"}, {"cna_circut": "c0"}, {"cna_circuit": "c0", "cna_multiplier": float("nan")},
        {"cna_circuit": "c0", "cna_multiplier": True}, {"cna": {}}, {"cna_column": 2}, {"cna_multiplier": 0},
    ):  # fmt: skip
        try:
            llm.generate([{"prompt_token_ids": work.prompts[0]}], sampling(**extra), use_tqdm=False)
        except Exception as error:
            assert type(error).__name__ == "VLLMValidationError", repr(error)
            refused.append(str(error))
    several = sampling(cna_column=0)
    several.n = 2
    try:
        llm.generate([{"prompt_token_ids": work.prompts[0]}], several, use_tqdm=False)
    except Exception as error:
        refused.append(str(error))
    assert len(refused) == 8 and "2 answers" in refused[-1], refused
    other = Circuit(swapped.neurons, swapped.n_layers, swapped.n_neurons + 1)
    for bad in (other, Circuit(swapped.neurons, 30, 1536, model={"name": "x", "decoder_sha256": "0" * 64})):
        try:
            plugin.add(llm, "bad", bad)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) == 10, refused
    return work.check(work.run(llm, [(0, "c0", 0.0), (1, None, 1.0)]), [(0, "c0", 0.0), (1, None, 1.0)]) | {
        "refusals": len(refused)
    }


def document(work):
    """The first Python block of docs/vllm.md, as it is written."""
    names = run_block(work, 0)
    assert names["output"].cna["n_neurons"] == 92
    return {}


def document_discovery(work):
    """The second block, which goes on from the first one's imports."""
    from vllm import LLM

    prompts = [{"prompt_token_ids": ids} for ids in work.prompts]
    names = run_block(work, 1, LLM=LLM, positive_prompts=prompts[:2], negative_prompts=prompts[2:4])
    assert len(names["circuit"].neurons) == 46
    return {}


def run_block(work, number, **names):
    """Run a Python block of docs/vllm.md; what it leaves, by name."""
    text = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2 and "vllm" in blocks[0]
    os.chdir(work.directory)
    Path("refusal.json").write_bytes(Path(work.circuits["c0"]).read_bytes())
    exec(blocks[number].replace("path/to/model", str(work.directory / "model")), names)
    return names


def start_refused(work):
    """What an engine does not start with: a line each."""
    from cna_kernels import Circuit

    first = Circuit.load(work.circuits["c0"])
    wide = work.directory / "wide.json"
    Circuit(first.neurons, first.n_layers, first.n_neurons + 1).save(wide)
    said = []
    for changes in (
        dict(cna={"circuits": {"c0": "/absent.json"}}), dict(cna={"circuits": {"wide": str(wide)}}),
        dict(cna={"circuit": {}}), dict(cna={"columns": "2"}),
        dict(kv_sharing_fast_prefill=True),
    ):  # fmt: skip
        try:
            work.engine(**changes)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            raise AssertionError(f"started with {changes}")
    import cna_kernels.vllm.plugin as plugin

    plugin.TESTED = ("0.31.",)
    try:
        work.engine()
    except Exception as error:
        said.append(str(error))
    assert "absent.json" in said[0] and "wide.json: n_neurons" in said[1] and "circuit: is unknown" in said[2], said
    assert "columns: expected a whole number" in said[3] and "kv_sharing_fast_prefill" in said[4], said
    assert "is not tested" in said[5], said
    return {"refusals": len(said)}


CASES = [
    lora, mixed, prefix, preempted, speculative, compiled, quantised, phases, tensor_parallel, runner_v2, sums, live,
    document, document_discovery, start_refused,
]  # fmt: skip


def prepare(name):
    """What must be set before vLLM is imported."""
    if name == "tensor_parallel":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    if name == "runner_v2":
        os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
        import triton.backends

        class Driver:
            @staticmethod
            def is_active():
                return True

        triton.backends.backends["cpu"] = type("Backend", (), {"driver": Driver, "compiler": None})()


if __name__ == "__main__":
    prepare(sys.argv[1])
    began = time.time()
    found = {case.__name__: case for case in CASES}[sys.argv[1]](Work(sys.argv[2]))
    print(json.dumps({"case": sys.argv[1], **found, "seconds": round(time.time() - began)}))
