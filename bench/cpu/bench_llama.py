"""The CPU engine on GGUF files against llama.cpp on the same file: random weights in the shapes of real models.

L1 decode (one token at a time, after a prompt of 32), L2 prefill of 256 tokens, L3 decode of 8 sequences together, each
with bf16, Q8_0, Q4_0 and Q4_K_M, which llama.cpp itself makes from the bf16 file. Both sides use as many threads as
PyTorch; llama.cpp runs with flash attention and a context of 512 tokens for each sequence. Before a row is measured the
logits of both sides are compared: llama.cpp rounds activations to 8 bits, so they agree to a few percent.

    pip install -e ".[llama]"       builds llama.cpp, about 10 minutes

On a CPU with AMX that build may end with an illegal instruction at the first product; without AMX it runs:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON \
        -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX2=ON" pip install -e ".[llama]"
"""

import ctypes
import os
from functools import partial

import numpy as np
import pytest
import torch

from cna_kernels.cpu import library
from cna_kernels.model.checkpoint.formats import open_checkpoint, read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.generate import generate
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
