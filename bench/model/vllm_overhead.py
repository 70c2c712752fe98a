"""What the plug-in costs a token in vLLM, beside vLLM's own LoRA for the same circuits; writes bench/results/vllm.json.

    python bench/model/vllm_overhead.py [--steps 60] [--shape SmolLM2-135M,Llama-3.2-1B] [--compiled] [--twin]

It runs in the environment that `make test-engines` makes, or on a GPU where vLLM is installed. Four engines with equal
random weights live in one process: vLLM alone, vLLM with the plug-in, with the plug-in and columns to sum in, and vLLM
with LoRA. Each decodes a batch of 16 requests; their steps take turns, so that the machine's mood meets all alike.

Rows:

- V1 idle: no request is steered. The plug-in's step over vLLM's; LoRA's step over vLLM's beside it.
- V2 16 circuits: every request has a circuit of its own, or the adapter of one (a rank for each of its neurons).
- V3 columns: as V2, by an engine that may be asked for sums.
- V0 twin, with --twin: a second engine of vLLM alone over the first, which is 1 but for where its memory lies.

On a GPU `--compiled` means CUDA graphs, too, and a step ends when its tokens are on the host: batches are not prepared
while another runs, which would hide what a step takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
)  # fmt: skip
SHAPES = {  # layers, hidden, neurons, heads, key/value heads, words
    "SmolLM2-135M": (30, 576, 1536, 9, 3, 49152),
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 128256),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128256),
}
N_REQUESTS, N_PROMPT, RANK = 16, 16, 16
TARGETS = {"V1 idle": 1.01, "V2 16 circuits": 1.03}


def write_config(directory, shape):
    n_layers, hidden, neurons, heads, kv_heads, words = SHAPES[shape]
    record = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "hidden_act": "silu",
        "intermediate_size": neurons, "num_hidden_layers": n_layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "vocab_size": words,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
    }  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(record))


def write_circuits(directory, shape):
    """16 circuits of 0.1% of the neurons, as files and as LoRA adapters of a uniform rank."""
    import torch
    from safetensors.torch import save_file

    from cna_kernels import Circuit

    n_layers, hidden, neurons, *_ = SHAPES[shape]
    k = max(1, round(0.001 * n_layers * neurons))
    per_layer = -(-k // n_layers)
    everything = Circuit(tuple((i % n_layers, i // n_layers, 1.0) for i in range(k)), n_layers, neurons)
    paths, adapters = {}, []
    for number in range(N_REQUESTS):
        circuit = everything.random_like(number)
        paths[f"c{number}"] = str(directory / f"c{number}.json")
        circuit.save(paths[f"c{number}"])
        folder, tensors, members = directory / f"lora{number}", {}, circuit.by_layer()
        folder.mkdir()
        for layer in range(n_layers):
            name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
            a = torch.zeros(RANK, neurons, dtype=torch.bfloat16)
            mine = members.get(layer, [])
            assert len(mine) <= per_layer <= RANK
            a[range(len(mine)), mine] = 1
            tensors[f"{name}.lora_A.weight"] = a
            tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, RANK).bfloat16() * 0.02
        save_file(tensors, folder / "adapter_model.safetensors")
        record = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["down_proj"], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(record))
        adapters.append(str(folder))
    return paths, adapters, k


class Decoding:
    """An engine that decodes 16 requests, a step at a time."""

    def __init__(self, directory, *, compiled, **options):
        import torch
        from vllm import LLM

        if torch.cuda.is_available():  # what other engines of the process hold is not this engine's to count
            options |= dict(kv_cache_memory_bytes=2 << 30, gpu_memory_utilization=0.1, async_scheduling=False)
            options |= dict(compilation_config={"cudagraph_capture_sizes": [N_REQUESTS]}) if compiled else {}
        self.llm = LLM(
            model=str(directory), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024,
            max_num_seqs=N_REQUESTS, max_num_batched_tokens=512, block_size=32, disable_log_stats=True,
            enable_prefix_caching=False, enforce_eager=not compiled, **options,
        )  # fmt: skip
        self.engine, self.n = self.llm.llm_engine, 0

    def begin(self, extras, adapters):
        """Put the requests into the batch and run their prompts."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        for place in range(N_REQUESTS):
            params = SamplingParams(
                temperature=0, max_tokens=900, ignore_eos=True, detokenize=False, extra_args=extras[place]
            )
            lora = adapters and LoRARequest(f"a{place}", place + 1, adapters[place])
            prompt = {"prompt_token_ids": [(7 * place + i) % 1000 + 2 for i in range(N_PROMPT)]}
            self.n += 1
            self.engine.add_request(str(self.n), prompt, params, lora_request=lora or None)
        for _ in range(4):
            self.engine.step()

    def step(self):
        start = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - start

    def end(self):
        self.engine.abort_request([str(n) for n in range(self.n + 1)])
        self.engine.step()


def compare(engines, steps):
    """Ratio of each engine's step to the first's, pair by pair, and the noise of the first against itself."""
    times, draw = [], random.Random(0)
    for _ in range(steps):  # in random order: a step leaves the caches its own, and LoRA's leaves more
        row = [0.0] * len(engines)
        for number in draw.sample(range(len(engines)), len(engines)):
            row[number] = engines[number].step()
        times.append(row)
    base = [row[0] for row in times]
    noise = statistics.median(max(a, b) / min(a, b) for a, b in itertools.pairwise(base))
    ratios = [statistics.median(row[i] / row[0] for row in times) for i in range(1, len(engines))]
    # the ratio of medians of independent halves says how far the ratio itself can be trusted
    spread = [
        abs(statistics.median(r[i] / r[0] for r in times[::2]) - statistics.median(r[i] / r[0] for r in times[1::2]))
        for i in range(1, len(engines))
    ]
    return ratios, spread, noise, statistics.median(base)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shape", default="SmolLM2-135M,Llama-3.2-1B")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, vLLM's default, instead of eager")
    parser.add_argument("--twin", action="store_true", help="a second engine of vLLM alone, for the noise of instances")
    parser.add_argument("--attention", help="vLLM's attention backend, e.g. TRITON_ATTN; default: its own choice")
    given = parser.parse_args()

    import torch
    import vllm

    from results import Results, cpu_environment

    setting = "compiled" if given.compiled else "eager"
    if torch.cuda.is_available():
        setting += f", {torch.cuda.get_device_name()}"
    results = Results("vllm", setting, cpu_environment() | {"vllm": vllm.__version__, "attention": given.attention})
    with tempfile.TemporaryDirectory() as folder:
        for shape in given.shape.split(","):
            directory = Path(folder, shape)
            write_config(directory, shape)
            circuits, adapters, k = write_circuits(directory, shape)
            common = dict(compiled=given.compiled)
            if given.attention:
                common["attention_config"] = {"backend": given.attention}
            cna = {"circuits": circuits}
            engines = [
                Decoding(directory, **common),
                Decoding(directory, additional_config={"cna": cna}, **common),
                Decoding(directory, additional_config={"cna": cna | {"columns": 2}}, **common),
                Decoding(directory, enable_lora=True, max_loras=N_REQUESTS, max_lora_rank=RANK, **common),
            ]
            if given.twin:
                engines.append(Decoding(directory, **common))
            nothing = [None] * N_REQUESTS
            each = [{"cna_circuit": f"c{place}", "cna_multiplier": 0.05 * place} for place in range(N_REQUESTS)]
            about = dict(shape=shape, m=N_REQUESTS, dtype="bf16", competitor="vLLM alone")
            for row, extras, used in (("V1 idle", nothing, None), ("V2 16 circuits", each, adapters)):
                for place, engine in enumerate(engines):
                    engine.begin(extras if place in (1, 2) else nothing, used if place == 3 else None)
                ratios, spread, noise, base = compare(engines, given.steps)
                for engine in engines:
                    engine.end()
                more = dict(step_ms=round(1e3 * base, 2), neurons=k, steps=given.steps)
                names = [row, "V3 columns" if used else None, f"{row}, LoRA", None if used else "V0 twin"]
                for place, name in enumerate(names[: len(ratios)]):
                    if name is not None:
                        found = dict(ratio=ratios[place], noise=noise)
                        target = TARGETS.get(name)
                        results.add(name, result=found, target=target, spread=round(spread[place], 4), **about, **more)
            del engines, engine
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
