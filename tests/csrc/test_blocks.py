"""The CPU engine on weights in GGUF's blocks, at every level: the numbers are those of the gguf package, the products
those with these numbers."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from levels import EMULATED, LEVELS

from cna_kernels import ops
from cna_kernels.blocks import FORMATS, BlockWeight
from cna_kernels.cpu import library, plan
from covering import parameters
from op_cases import DTYPES, assert_close, assert_values, make_case, wider, with_feature

if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q6_K": (208,)}
SCALES |= dict.fromkeys(("Q4_K", "Q5_K"), (0, 2))  # where the fp16 numbers of a block lie
SIZE = dict.fromkeys(FORMATS, 0.01) | {"Q4_K": 4e-4, "Q5_K": 4e-4, "Q6_K": 1e-4}  # so that numbers are about 0.1
# few tokens, several passes of four, the most that dot_blocks.h serves and one more, panels, more than one chunk
TOKENS = (1, 2, 3, 7, 12, 13, 40, 260)


def random_blocks(kind, n_rows, n_columns, seed=0, scale=None):
    """A weight of random bytes, with fp16 scales of the size of SIZE, or all equal to ``scale``."""
    _, elements, n_bytes = FORMATS[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n_rows * n_columns // elements, n_bytes), dtype=np.uint8)
    for place in SCALES[kind]:
        size = rng.normal(0, SIZE[kind], len(blocks)) if scale is None else np.full(len(blocks), scale)
        blocks[:, place : place + 2] = size.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return BlockWeight(torch.from_numpy(blocks.reshape(n_rows, -1)), kind)


def numbers_of(weight):
    """fp32, by the gguf package."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    numbers = dequantize(weight.blocks.contiguous().numpy(), GGMLQuantizationType[weight.dtype])
    return torch.from_numpy(numbers).view(weight.shape)


def name_of(value):
    return str(value).removeprefix("torch.")


each_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_few_tokens_meet_the_very_numbers(level, dtype):
    """127 d - 126 d is d = 1 + 2^-7 with the numbers themselves, and 1 with those rounded to the tokens' dtype."""
    weight = random_blocks("Q8_0", 40, 32, scale=1 + 2**-7)
    weight.blocks[:, 2], weight.blocks[:, 3] = 127, 126
    few = plan.few_blocks(library.isa(), dtype)
    for n_tokens, answer in ((1, 1 + 2**-7), (few, 1 + 2**-7), (few + 1, 1.0), (40, 1.0)):
        x = torch.zeros(n_tokens, 32, dtype=dtype)
        x[:, 0], x[:, 1] = 1, -1
        assert (ops.linear(x, weight, backend="cpu") == answer).all(), n_tokens


@each_format
def test_numbers_are_those_of_the_gguf_package(level, kind):
    """Bit for bit, rows of one block and of several, subnormal and largest scales among them; rounded as by PyTorch."""
    for n_rows, n_blocks in ((1, 1), (5, 3), (40, 8), (3, 11)):
        weight = random_blocks(kind, n_rows, n_blocks * FORMATS[kind][1], seed=n_rows)
        place = SCALES[kind][0]
        odd = np.array([6e-8, -0.0, 65504.0], dtype=np.float16).view(np.uint8)
        weight.blocks[0, place : place + 2] = torch.from_numpy(odd[:2])
        weight.blocks[-1, place : place + 2] = torch.from_numpy(odd[4:])
        expected = numbers_of(weight)
        assert torch.equal(weight.dense().view(torch.int32), expected.view(torch.int32))
        assert expected.abs().max() > 0.05
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(weight.dense(dtype), expected.to(dtype))


def covered(cases):
    """pytest's parameters for cases that begin with a level."""
    names = ["-".join("-".join(x) if isinstance(x, tuple) else name_of(x) for x in case) for case in cases]
    return parameters(cases, names, everyday=lambda case: case[0] != EMULATED)


LINEAR = list(itertools.product(LEVELS, FORMATS, TOKENS, DTYPES))


@pytest.mark.parametrize(("level", "kind", "n_tokens", "dtype"), covered(LINEAR), indirect=["level"])
def test_linear(level, kind, n_tokens, dtype):
    generator = torch.Generator().manual_seed(n_tokens)
    widths = (256, 512, 1280) if FORMATS[kind][1] == 256 else (32, 576, 992)
    for n_out, n_in in zip((3, 33, 70), widths, strict=True):
        weight = random_blocks(kind, n_out, n_in)
        x = torch.randn(n_tokens, n_in, generator=generator).to(dtype)
        bias = torch.randn(n_out, generator=generator).to(dtype)
        numbers = numbers_of(weight)
        y = ops.linear(x, weight, bias, backend="cpu")
        answer = F.linear(x.double(), numbers.double(), bias.double())
        assert_close("y", y, F.linear(x, numbers.to(dtype), bias), answer, slack=4, dtype=dtype)


@each_format
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_exact_on_small_integers(level, kind, n_tokens):
    """Scales of 1 and tokens of small whole numbers: no rounding anywhere, so every level has the same bits."""
    weight = random_blocks(kind, 37, 512, scale=1.0)
    if kind == "Q6_K":  # its numbers are at most 32 * 127: kept below 2**8, which bf16 holds
        weight.blocks.view(37, 2, -1)[:, :, 192:208] = 1
    if kind in ("Q4_K", "Q5_K"):
        weight.blocks.view(37, 2, -1)[:, :, 4:16] &= 3
    numbers = numbers_of(weight).double()
    assert torch.equal(numbers, numbers.round()) and 8 <= numbers.abs().max() <= 256
    generator = torch.Generator().manual_seed(1)
    for dtype in DTYPES:
        x = torch.randint(-2, 3, (n_tokens, 512), generator=generator).to(dtype)
        y = ops.linear(x, weight, backend="cpu")
        assert torch.equal(y, (x.double() @ numbers.T).to(dtype))


def case_in_blocks(n_tokens, dtype, gate="Q4_K", up="Q4_K", down="Q6_K", n_hidden=512, n_neurons=1280):
    """A case of op_cases whose weights are the numbers of blocks, rounded to dtype; and the weights."""
    case = make_case(n_tokens, n_neurons, dtype, n_hidden=n_hidden)
    weights = [
        random_blocks(gate, n_neurons, n_hidden, 1), random_blocks(up, n_neurons, n_hidden, 2),
        random_blocks(down, n_hidden, n_neurons, 3),
    ]  # fmt: skip
    case.w_gate_up, case.w_down = torch.cat([w.dense(dtype) for w in weights[:2]]), weights[2].dense(dtype)
    return case, weights


def run(op, case, weights, extras):
    gate, up, down = weights
    if op == "gated_mlp":
        return ops.gated_mlp(case.x, (gate, up), down, **extras, backend="cpu")
    return ops.down_proj(case.act, down, **extras, backend="cpu")


KINDS = [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "Q4_0", "Q5_K"), ("Q5_0", "Q5_1", "Q4_1")]


RIDING = list(itertools.product(LEVELS, ("gated_mlp", "down_proj"), (1, 6, 45), KINDS, DTYPES))


@pytest.mark.parametrize(("level", "op", "n_tokens", "kinds", "dtype"), covered(RIDING), indirect=["level"])
def test_sums_and_steering_ride_along(level, op, n_tokens, kinds, dtype):
    case, weights = case_in_blocks(n_tokens, dtype, *kinds)
    for feature in ("both", "columns"):
        extras = with_feature(case, feature)
        assert_values(case, op, run(op, case, weights, extras), extras)


def test_the_engines_own_type_beside_blocks(level):
    """gate and up in the activations' dtype, down in blocks; and down alone in that dtype."""
    case, (gate, up, down) = case_in_blocks(5, torch.bfloat16)
    for w_gate_up, w_down in ((case.w_gate_up, down), ((gate, up), case.w_down), ((gate, case.w_gate_up[1280:]), down)):
        extras = case.extras()
        y = ops.gated_mlp(case.x, w_gate_up, w_down, **extras, backend="cpu")
        assert_values(case, "gated_mlp", y, extras)


ALIKE = list(itertools.product(LEVELS, FORMATS, (1, 6, 45)))


@pytest.mark.parametrize(("level", "kind", "n_tokens"), covered(ALIKE), indirect=["level"])
def test_threads_neighbours_strides_and_rows_without_a_circuit(level, kind, n_tokens):
    """The same bits for any number of threads, for a token in another batch, for rows apart from each other; and for
    tokens that no circuit steers."""
    case, weights = case_in_blocks(n_tokens, torch.bfloat16, kind, kind, kind)
    results = set()
    for n_threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        extras = case.extras()
        y = run("gated_mlp", case, weights, extras)
        torch.set_num_threads(before)
        results.add(b"".join(x.view(torch.uint8).numpy().tobytes() for x in (y, extras["act_sum"])))
    assert len(results) == 1
    plain = run("gated_mlp", case, weights, {})
    free = (case.row_circuit < 0) | (case.row_circuit >= case.scale.offsets.shape[0])
    assert torch.equal(y[free], plain[free]) and (n_tokens == 1 or not torch.equal(y, plain))
    apart = [BlockWeight(wider(w.blocks), kind) for w in weights]
    assert torch.equal(run("gated_mlp", case, apart, {}), plain)
    part = n_tokens - n_tokens // 6
    case.x = case.x[-part:].clone()
    assert torch.equal(run("gated_mlp", case, weights, {}), plain[-part:])


@each_format
def test_rows_end_where_memory_ends(level, kind, tmp_path):
    """A weight at the end of a mapped file, with nothing behind it: reading further would be a signal."""
    _, elements, n_bytes = FORMATS[kind]
    weight = random_blocks(kind, 32, elements * 3)
    size = 32 * 3 * n_bytes
    start = -size % 4096
    path = tmp_path / "weights"
    path.write_bytes(bytes(start) + weight.blocks.numpy().tobytes())
    mapped = np.memmap(path, dtype=np.uint8, mode="c")[start:]
    assert (mapped.ctypes.data + size) % 4096 == 0
    at_the_end = BlockWeight(torch.from_numpy(mapped).view(32, -1), kind)
    for n_tokens in (1, 3, 20):
        x = torch.randn(n_tokens, elements * 3, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert torch.equal(ops.linear(x, at_the_end, backend="cpu"), ops.linear(x, weight, backend="cpu"))


@each_format
def test_rows_and_columns(kind):
    weight = random_blocks(kind, 40, 512)
    dense = weight.dense()
    ids = torch.tensor([[3, 39, 0], [7, 3, 3]])
    assert torch.equal(weight.rows(ids), dense[ids])
    assert torch.equal(weight.columns([0, 31, 32, 500, 31]), dense[:, [0, 31, 32, 500, 31]])
    assert torch.equal(weight.columns([511], torch.bfloat16), dense[:, [511]].bfloat16())


def test_gradients_flow_through_the_numbers():
    case, (gate, up, down) = case_in_blocks(3, torch.float32)
    x = case.x.clone().requires_grad_()
    ops.gated_mlp(x, (gate, up), down).sum().backward()
    y = case.x.clone().requires_grad_()
    ops.gated_mlp(y, case.w_gate_up, case.w_down, backend="reference").sum().backward()
    assert x.grad.abs().max() > 0.01
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5 * float(y.grad.abs().max()))


REFUSED = [
    (lambda w: ops.linear(torch.zeros(2, 500), w), r"w: expected shape \[any, 500\], got Q8_0 \[4, 512\]"),
    (lambda w: ops.gated_mlp(torch.zeros(2, 512), w, w), "w_down: expected shape"),
    (lambda w: ops.gated_mlp(torch.zeros(2, 4), w, w), "w_gate_up: expected a pair of gate and up"),
    (lambda w: ops.linear(torch.zeros(2, 512, device="meta"), w), "w: blocks are read on the CPU"),
    (lambda w: BlockWeight(w.blocks, "Q3_K"), "dtype: expected one of Q4_0, .*, got 'Q3_K'"),
    (lambda w: BlockWeight(w.blocks[:, :-1], "Q8_0"), "blocks: expected rows of whole blocks of 34 bytes"),
    (lambda w: BlockWeight(w.blocks.view(torch.int8), "Q8_0"), "blocks: expected rows of whole blocks"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_blocks("Q8_0", 4, 512))
