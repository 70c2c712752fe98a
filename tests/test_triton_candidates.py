"""The candidates' kernels, each called by its launcher, against the definition: on a GPU or interpreted."""

from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from cna_kernels import make_scale
from cna_kernels.triton import down_flat, whole_rows
from cna_kernels.triton.down_decode import down_split
from cna_kernels.triton.split_last import COUNTERS, Counters, split_last
from op_cases import (
    DTYPES,
    FEATURES,
    assert_nothing_outside,
    assert_values,
    exact_case,
    make_case,
    wider,
    with_feature,
)
from test_triton import DEVICE, WHERE, on_device

pytestmark = pytest.mark.interpreted


def names(values):
    return [f"{WHERE}-{'-'.join(map(str, value))}".replace("torch.", "") for value in values]


# (N, H) of the pair: one neuron, fewer than a program's rows, no multiple of them
ROWS = [(1, 5), (6, 48), (130, 72)]


def pair(case, extras):
    x, w_gate_up, w_down = (part.to(DEVICE) for part in case.inputs("gated_mlp"))
    return whole_rows.down_rows(whole_rows.gate_up_rows(x, w_gate_up, **extras), w_down)


def assert_pair(N, H, dtype, feature):
    case = make_case(1, N, dtype, n_hidden=H)
    case.weight.fill_(0.7)  # make_case gives every third token, the first of them this one, weights of 0
    extras = with_feature(case, feature)
    if extras["weight"] is not None:
        case.weight = extras["weight"] = torch.rand_like(extras["weight"])
    extras = on_device(extras)
    y = pair(case, extras)
    assert_values(case, "gated_mlp", y, extras)
    assert y.dtype == dtype and y.shape == (1, H)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H"), ROWS, ids=names(ROWS))
def test_pair(N, H, dtype, feature):
    assert_pair(N, H, dtype, feature)


# more than one load a thread, the last one ragged: of gate and up, of down; and a second block of a circuit's neurons
LONG = [(40, 520, torch.float32, "plain"), (520, 24, torch.float32, "plain"), (1032, 24, torch.bfloat16, "circuits")]


@pytest.mark.parametrize(("N", "H", "dtype", "feature"), LONG, ids=names(LONG))
def test_pair_with_long_rows(N, H, dtype, feature):
    assert_pair(N, H, dtype, feature)


def test_pair_with_gate_and_up_apart():
    case = exact_case((1, 130, 72))
    together, apart = on_device(case.extras()), on_device(case.extras())
    x, w_gate_up, _ = (part.to(DEVICE) for part in case.inputs("gated_mlp"))
    act = whole_rows.gate_up_rows(x, w_gate_up, **together)
    halves = w_gate_up[:130].clone(), w_gate_up[130:].clone()
    assert torch.equal(whole_rows.gate_up_rows(x, halves, **apart), act)
    assert torch.equal(apart["act_sum"], together["act_sum"])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, about the planted NaN
def test_pair_writes_zero_over_what_is_not_finite():
    case = exact_case((1, 130, 72))
    chosen = [0, 5, 129]
    case.scale = make_scale([dict.fromkeys(chosen, 0.0)], 130)
    case.row_circuit.zero_()
    extras = on_device(dict(scale=case.scale, row_circuit=case.row_circuit))
    expected = pair(case, extras)
    case.w_gate_up[[n + 130 for n in chosen]] = torch.tensor([torch.inf, torch.nan, -torch.inf]).bfloat16()[:, None]
    act = whole_rows.gate_up_rows(case.x.to(DEVICE), case.w_gate_up.to(DEVICE), **extras)
    assert (act[0, chosen] == 0).all()
    assert torch.equal(pair(case, extras), expected)


def test_pair_does_not_read_a_token_that_counts_nowhere():
    case = exact_case((1, 130, 72))
    assert (case.weight == 0).all()
    extras = on_device(case.extras())
    case.x[:] = torch.nan
    pair(case, extras)
    assert torch.equal(extras["act_sum"].cpu(), case.act_sum) and torch.equal(extras["act_sumsq"].cpu(), case.act_sumsq)


def test_pair_keeps_to_its_rows():
    """Any row stride, nothing written outside, the same bits again."""
    case = exact_case((1, 136, 72))
    case.weight.fill_(0.5)
    compact = on_device(case.extras())
    expected = pair(case, compact)
    case.x, case.w_gate_up, case.w_down = (wider(part) for part in (case.x, case.w_gate_up, case.w_down))
    extras = on_device(case.extras())
    extras["act_sum"], extras["act_sumsq"] = wider(extras["act_sum"]), wider(extras["act_sumsq"])
    x, w_gate_up, w_down = (wider(part.to(DEVICE)) for part in case.inputs("gated_mlp"))
    y = whole_rows.down_rows(whole_rows.gate_up_rows(x, w_gate_up, **extras), w_down)
    assert torch.equal(y, expected)
    for part in ("act_sum", "act_sumsq"):
        assert torch.equal(extras[part], compact[part])
        assert_nothing_outside(part, extras[part])


def test_pair_fits_the_models():
    for H, N in ((2048, 8192), (4096, 14336), (3584, 18944), (8192, 29568)):
        assert whole_rows.fits(1, N, H, 2)
        assert not whole_rows.fits(2, N, H, 2)
    assert not whole_rows.fits(1, 32769, 4096, 2) and not whole_rows.fits(1, 14336, 8193, 4)


# (T, N, H): T on both sides of its blocks of 16 and 32, rows of 16 and of 32, one neuron, no multiple of any tile
FLAT = [(2, 1, 5), (16, 130, 72), (17, 520, 72), (31, 300, 200), (32, 256, 64)]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", FLAT, ids=names(FLAT))
def test_down_flat(shape, dtype):
    T, N, H = shape
    case = make_case(T, N, dtype, n_hidden=H)
    extras = with_feature(case, "plain")
    y = down_flat.down_flat(case.act.to(DEVICE), case.w_down.to(DEVICE))
    assert_values(case, "down_proj", y, extras)
    assert y.dtype == dtype and y.is_contiguous()
    apart = down_flat.down_flat(wider(case.act.to(DEVICE)), wider(case.w_down.to(DEVICE)), dependent=True)
    assert torch.equal(apart, y)


def test_down_flat_fits_few_tokens_of_two_bytes():
    assert down_flat.fits(2, 2) and down_flat.fits(32, 2)
    assert not down_flat.fits(33, 2) and not down_flat.fits(16, 4)


# (T, N, H): T around the blocks of 16, 32 and 64 and two of these, N in one run and in several, the last one ragged
SPLIT = [(1, 48, 24), (2, 2100, 72), (16, 1032, 130), (17, 2048, 64), (31, 1025, 5), (70, 1100, 24)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SPLIT, ids=names(SPLIT))
def test_split_last_has_the_bits_of_down_split(shape, dtype):
    T, N, H = shape
    case = make_case(T, N, dtype, n_hidden=H)
    extras = with_feature(case, "plain")
    inputs = case.act.to(DEVICE), case.w_down.to(DEVICE)
    for _ in range(20 if DEVICE == "cuda" else 1):
        y = split_last(*inputs)
        assert_values(case, "down_proj", y, extras)
        assert torch.equal(y, down_split(*inputs))
        assert torch.equal(split_last(*(wider(part) for part in inputs), dependent=True), y)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, about the planted NaN
@pytest.mark.parametrize("product", [down_flat.down_flat, split_last], ids=["flat16", "split_last"])
def test_a_token_that_is_not_finite_stays_alone(product):
    case = exact_case((17, 1100, 72))
    expected = product(case.act.to(DEVICE), case.w_down.to(DEVICE))
    case.act[5] = torch.nan
    y = product(case.act.to(DEVICE), case.w_down.to(DEVICE))
    assert torch.isnan(y[5]).all()
    others = [t for t in range(17) if t != 5]
    assert torch.equal(y[others], expected[others])


def test_split_last_leaves_its_counters_at_zero(monkeypatch):
    kept = []
    take = COUNTERS.take
    monkeypatch.setattr(COUNTERS, "take", lambda *args: kept.append(take(*args)) or kept[-1])
    case = exact_case((70, 2100, 72))
    split_last(case.act.to(DEVICE), case.w_down.to(DEVICE))
    assert len(kept) == 1 and (kept[0] == 0).all()
    monkeypatch.setattr(COUNTERS, "take", lambda *args: kept[0])
    split_last(case.act.to(DEVICE), case.w_down.to(DEVICE))
    assert (kept[0] == 0).all()


def test_no_two_launches_that_may_run_at_once_share_counters(monkeypatch):
    """The device is made up: two streams, and captures on one of them."""
    stream, capturing, zeros = [1], [False], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=stream[0]))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    counters, device = Counters(), torch.device("cuda", 0)
    monkeypatch.setattr(Counters, "POOL", 200)

    def take(n_tiles, on=1, captured=False):
        stream[0], capturing[0] = on, captured
        taken = counters.take(device, n_tiles)
        assert len(taken) >= n_tiles and (taken == 0).all()
        return taken

    assert take(64).data_ptr() == take(80).data_ptr(), "launches of a stream follow each other"
    apart = [take(64), take(64, on=2), take(2000, on=2)]
    apart += [take(64, captured=True) for _ in range(3)]
    assert len(counters.pool[device]) == 8
    apart += [take(64, captured=True)]  # the pool is too small: zeroed by the graph itself
    take(64)
    assert len(counters.pool[device]) == 200, "filled again outside a capture"
    apart += [take(64, captured=True) for _ in range(3)]
    ranges = sorted((taken.data_ptr(), taken.data_ptr() + taken.nbytes) for taken in apart)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
    held = {taken.data_ptr() for taken in counters.taken}
    assert len(held) == 6, "held for as long as a graph may run"


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_split_last_in_graphs_beside_each_other():
    """Two graphs and eager calls on three streams at once, each with counters of its own."""
    case = make_case(32, 14336, torch.bfloat16, n_hidden=4096)
    act, w_down = case.act.to(DEVICE), case.w_down.to(DEVICE)
    expected = split_last(act, w_down)
    graphs, ys = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            ys.append(split_last(act, w_down))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams[:2], strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = split_last(act, w_down)
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for y in (*ys, eager))
