"""One set of random inputs for every op, with answers computed by numpy in float64 from the definition alone."""

from dataclasses import dataclass

import numpy as np
import torch

from cna_kernels.scale import Scale, make_scale

# (T, N): decode, one neuron, sizes that are no multiple of a tile, sizes that are, and an empty call
SHAPES = [(1, 48), (5, 1), (63, 130), (64, 128), (0, 16)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
N_HIDDEN, N_COLUMNS, N_CIRCUITS = 24, 3, 4
FEATURES = ["plain", "sums", "sumsq", "scale", "both", "one circuit", "circuits", "columns"]


INPUTS = {
    "gated_mlp": ("x", "w_gate_up", "w_down"), "swiglu": ("gate", "up"), "steer_act": ("act",),
    "down_proj": ("act", "w_down"),
}  # fmt: skip
OPS = list(INPUTS)


@dataclass
class Case:
    x: torch.Tensor  # [T, H]
    w_gate_up: torch.Tensor  # [2N, H]
    w_down: torch.Tensor  # [H, N]
    gate: torch.Tensor  # [T, N], the left half of a wider tensor: row stride 2N
    up: torch.Tensor  # [T, N], the right half
    act: torch.Tensor  # [T, N]
    token_weight: torch.Tensor  # [T, C]
    act_sum: torch.Tensor  # [C, N], not zero, so that setting instead of adding shows
    act_sumsq: torch.Tensor  # [C, N]
    scale: Scale
    row_circuit: torch.Tensor  # [T]

    def extras(self):
        """Fresh copies of the optional arguments; the two sums come back changed."""
        return dict(
            token_weight=self.token_weight,
            act_sum=self.act_sum.clone(),
            act_sumsq=self.act_sumsq.clone(),
            scale=self.scale,
            row_circuit=self.row_circuit,
        )

    def inputs(self, op):
        return [getattr(self, name) for name in INPUTS[op]]

    def multipliers(self):
        """The steering factor of every token and neuron, ``[T, N]`` float64, by loops over the sparse table."""
        multipliers = np.ones((self.row_circuit.shape[0], self.gate.shape[1]))
        offsets, index, value = (part.numpy() for part in self.scale)
        for token, circuit in enumerate(self.row_circuit.tolist()):
            if 0 <= circuit < len(offsets):
                for entry in range(offsets[circuit][0], offsets[circuit][-1]):
                    multipliers[token, index[entry]] = value[entry]
        return multipliers


def make_case(n_tokens, n_neurons, dtype, seed=0, n_hidden=N_HIDDEN):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, spread=1.0):
        return (torch.randn(*shape, generator=generator) * spread).to(dtype)

    fused = normal(n_tokens, 2 * n_neurons)
    token_weight = torch.rand(n_tokens, N_COLUMNS, generator=generator)
    token_weight[::3] = 0  # tokens that count nowhere
    members = [sorted(torch.randperm(n_neurons, generator=generator)[:k].tolist()) for k in (3, 0, 1, 7)]
    values = iter([0.0, 2.0, -1.5, 0.0, 0.25, 1.0, 3.0, 0.0, 0.5, 1.75, 0.125])
    circuits = [{neuron: next(values) for neuron in neurons} for neurons in members]
    row_circuit = torch.randint(-1, N_CIRCUITS, (n_tokens,), generator=generator, dtype=torch.int32)
    row_circuit[10::11] = 9  # no circuit: must count as -1
    row_circuit[4::11] = -3
    return Case(
        x=normal(n_tokens, n_hidden),
        w_gate_up=normal(2 * n_neurons, n_hidden, spread=n_hidden**-0.5),
        w_down=normal(n_hidden, n_neurons, spread=n_neurons**-0.5),
        gate=fused[:, :n_neurons],
        up=fused[:, n_neurons:],
        act=normal(n_tokens, n_neurons),
        token_weight=token_weight,
        act_sum=torch.randn(N_COLUMNS, n_neurons, generator=generator),
        act_sumsq=torch.rand(N_COLUMNS, n_neurons, generator=generator),
        scale=make_scale(circuits, n_neurons),
        row_circuit=row_circuit,
    )


def exact(case, op):
    """(output, act_sum, act_sumsq) in float64 from the formulas."""
    double = {name: getattr(case, name).double().numpy() for name in ("x", "w_gate_up", "w_down", "gate", "up", "act")}
    n_neurons = case.gate.shape[1]
    if op == "gated_mlp":
        gate_up = double["x"] @ double["w_gate_up"].T
        gate, up = gate_up[:, :n_neurons], gate_up[:, n_neurons:]
    else:
        gate, up = double["gate"], double["up"]
    act = double["act"] if "act" in INPUTS[op] else gate / (1 + np.exp(-gate)) * up
    token_weight = case.token_weight.double().numpy()
    act_sum = case.act_sum.double().numpy() + token_weight.T @ act
    act_sumsq = case.act_sumsq.double().numpy() + token_weight.T @ act**2
    scaled = act * case.multipliers()
    y = scaled @ double["w_down"].T if "w_down" in INPUTS[op] else scaled
    return tuple(torch.from_numpy(np.asarray(part)) for part in (y, act_sum, act_sumsq))


def torch_same_dtype(case, op):
    """The same three results by ordinary PyTorch in the inputs' dtype: our error is compared with theirs."""
    n_neurons = case.gate.shape[1]
    gate, up = case.gate, case.up
    if op == "gated_mlp":
        gate, up = (case.x @ case.w_gate_up.T).split(n_neurons, dim=1)
    act = case.act if "act" in INPUTS[op] else torch.nn.functional.silu(gate) * up
    act_sum = case.act_sum + case.token_weight.T @ act.float()
    act_sumsq = case.act_sumsq + case.token_weight.T @ act.float().square()
    scaled = act * torch.from_numpy(case.multipliers()).to(act.dtype)
    return (scaled @ case.w_down.T if "w_down" in INPUTS[op] else scaled), act_sum, act_sumsq


def assert_close(name, got, plain, answer, *, slack, dtype):
    """Our error is at most ``slack`` times PyTorch's own, plus one rounding to ``dtype`` of the largest value."""
    if answer.numel() == 0:
        assert got.shape == answer.shape
        return
    error = (got.double() - answer).abs()
    limit = slack * (plain.double() - answer).abs().max() + torch.finfo(dtype).eps * answer.abs().max()
    worst = tuple(int(i) for i in (error == error.max()).nonzero()[0]) if torch.isfinite(error).all() else "NaN"
    assert error.max() <= limit, f"{name} at {worst}: error {error.max():.3e}, limit {limit:.3e}"


def with_feature(case, feature, n_columns=9):
    """Turn the case into one with these features, and return its optional arguments."""
    T, N = case.gate.shape
    generator = torch.Generator().manual_seed(5)
    if feature == "one circuit":  # used by all tokens but a few
        chosen = torch.randperm(N, generator=generator)[: N // 5 + 1].tolist()
        case.scale = make_scale([{n: 0.25 * (n % 7) for n in chosen}], N)
        case.row_circuit = -(torch.arange(T) % 5 == 4).int()
    if feature == "circuits":  # one for each token; some are large, with entries in every block of neurons
        sizes = torch.randint(0, min(N, 90) + 1, (256,), generator=generator).tolist()
        members = [torch.randperm(N, generator=generator)[:size].tolist() for size in sizes]
        case.scale = make_scale([{n: 0.25 * (n % 7) for n in chosen} for chosen in members], N)
        case.row_circuit = torch.randint(0, 256, (T,), generator=generator, dtype=torch.int32)
    if feature == "columns":
        case.token_weight = torch.rand(T, n_columns, generator=generator) * (torch.arange(T) % 3 > 0)[:, None]
        case.act_sum = torch.randn(n_columns, N, generator=generator)
        case.act_sumsq = torch.rand(n_columns, N, generator=generator)
    extras = case.extras()
    if feature in ("plain", "scale", "one circuit", "circuits"):
        extras.update(token_weight=None, act_sum=None, act_sumsq=None)
    if feature == "sumsq":
        extras.update(act_sum=None)
    if feature in ("plain", "sums", "sumsq"):
        extras.update(scale=None, row_circuit=None)
        case.row_circuit = torch.full_like(case.row_circuit, -1)
    return extras


def exact_case(shape, dtype=torch.bfloat16):
    """A case (T, N, H) whose first tokens use circuits 0 and 3, none, and circuit 2."""
    T, N, H = shape
    case = make_case(T, N, dtype, n_hidden=H)
    case.row_circuit[: min(T, 4)] = torch.tensor([0, 3, -1, 2], dtype=torch.int32)[: min(T, 4)]
    return case


def wide_case(width, n_tokens, dtype, n_hidden=16):
    """A case whose four circuits have neurons in every block of 1,024, the first and the last of each among them."""
    case = make_case(n_tokens, width, dtype, n_hidden=n_hidden)
    edges = sorted({place for start in range(0, width, 1024) for place in (start, min(start + 1024, width) - 1)})
    inside = torch.randperm(width, generator=torch.Generator().manual_seed(1))[:60].tolist()
    places = sorted({*edges, *inside})
    circuits = [{n: (0.0, 2.0, -1.5, 0.25)[(n + number) % 4] for n in places[number::2]} for number in range(4)]
    case.scale = make_scale(circuits, width)
    case.row_circuit = torch.arange(n_tokens, dtype=torch.int32) % 5 - 1
    return case


SENTINEL = 77.0


def wider(x):
    """The same values as rows of a larger tensor filled with SENTINEL, on 16-byte boundaries."""
    rows, columns = x.shape
    base = torch.full((rows + 2, columns + 24), SENTINEL, dtype=x.dtype, device=x.device)
    inside = base[1:-1, 8 : 8 + columns]
    inside.copy_(x)
    base[:, 8 + columns :] = SENTINEL
    return inside


def assert_nothing_outside(name, inside):
    """All of the tensor that ``wider`` made, but its values, still is SENTINEL."""
    around = inside._base.clone()
    around[1:-1, 8:-16] = SENTINEL
    assert (around == SENTINEL).all(), f"{name}: written outside"


def assert_values(case, op, y, extras):
    """All results of an op within the tolerance rule."""
    results = (y, extras["act_sum"], extras["act_sumsq"])
    answers = zip(("y", "act_sum", "act_sumsq"), results, torch_same_dtype(case, op), exact(case, op), strict=True)
    for name, got, plain, answer in answers:
        if got is None:
            continue
        # down_proj and steer_act sum the given act itself; the other ops sum an act that was first rounded to dtype
        rounding = torch.float32 if "act" in INPUTS[op] and name != "y" else y.dtype
        assert_close(name, got.cpu(), plain, answer, slack=2 if name == "y" else 4, dtype=rounding)
