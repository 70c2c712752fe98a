"""Launches repeated from a record: equal to the launcher's own launches, or else the launcher runs again."""

import contextlib

import pytest
import torch

from cna_kernels import ops, plans
from cna_kernels.extras import Extras
from cna_kernels.scale import Scale
from cna_kernels.triton import down_proj, launch, plan, repeat
from cna_kernels.triton import ops as triton_ops
from cna_kernels.triton.down_decode import down_split
from cna_kernels.triton.gate_up_decode import gate_up_decode
from cna_kernels.triton.swiglu import swiglu
from covering import parameters
from op_cases import OPS, make_case, with_feature
from triton_cases import DEVICE, on_device, servable

pytestmark = pytest.mark.interpreted


# (T, N, H): one token, a few, and many; TMA can address the rows of all. The interpreter takes 10 seconds for many with
# circuits: not every day.
SHAPES = [(1, 48, 24), (9, 136, 40), (70, 136, 72)]
PLANS = [("swiglu", None), ("steer_act", None)] + [(op, name) for op, names in plan.PLANS.items() for name in names]
CASES = [
    ((op, name), shape, feature)
    for op, name in PLANS
    for shape in SHAPES
    for feature in ("plain", "scale", "both", "circuits")
    if name is None or servable(op, name, shape, torch.bfloat16)
]
IDS = [f"{op}-{name}-{'x'.join(map(str, shape))}-{feature}" for (op, name), shape, feature in CASES]


def case_of(shape, seed=0, dtype=torch.bfloat16):
    T, N, H = shape
    return make_case(T, N, dtype, seed=seed, n_hidden=H)


def outcome(op, case, feature):
    extras = on_device(with_feature(case, feature))
    y = getattr(ops, op)(*(part.to(DEVICE) for part in case.inputs(op)), **extras, backend="triton")
    return [x for x in (y, extras.get("act_sum"), extras.get("act_sumsq")) if x is not None]


@contextlib.contextmanager
def counted(monkeypatch):
    """Lists that grow with every record that is made, and with every record that is repeated."""
    made, repeated = [], []
    record, launch_all = repeat.Recorder.record, repeat._launch_all

    def count_record(self, result):
        made.append(record(self, result))
        return made[-1]

    def count_repeats(*given):
        repeated.append(given)
        return launch_all(*given)

    with monkeypatch.context() as patch:
        patch.setattr(repeat.Recorder, "record", count_record)
        patch.setattr(repeat, "_launch_all", count_repeats)
        yield made, repeated


def is_quick(case):
    """Of the largest shape, for which the interpreter takes 2 seconds, the cases with sums and scaling are enough."""
    _, shape, feature = case
    return shape != SHAPES[2] or feature == "both"


@pytest.mark.parametrize(("kernel", "shape", "feature"), parameters(CASES, IDS, everyday=is_quick))
def test_a_repeated_call_is_the_call(monkeypatch, kernel, shape, feature):
    """With other values, circuits and addresses, a repeated call gives what the call would give on its own."""
    op, name = kernel
    plans.use(name and f"{op}={name}")
    expected = outcome(op, case_of(shape, seed=1), feature)
    plans.forget()
    with counted(monkeypatch) as (made, repeated):
        first = outcome(op, case_of(shape, seed=0), feature)
        assert not repeated
        second = outcome(op, case_of(shape, seed=1), feature)
    nothing_to_launch = feature == "plain" and (op == "steer_act" or (name == "blas" and op == "down_proj"))
    assert len(repeated) == (0 if nothing_to_launch else len(made)), "each record was repeated once"
    assert all(record.launches for record in made) or nothing_to_launch
    assert not torch.equal(first[0], second[0])
    for got, wanted in zip(second, expected, strict=True):
        assert torch.equal(got, wanted)


def swiglu_of(gate, up, *extras):
    swiglu_of.calls += 1
    return swiglu(gate, up, **Extras(*extras).keywords())


def halves(T=3, N=48, offset=0, dtype=torch.bfloat16):
    """gate and up whose first element lies ``offset`` elements beyond 16 bytes."""
    space = torch.randn(2 * T * N + offset, device=DEVICE).to(dtype)[offset:]
    return space[: T * N].view(T, N), space[T * N :].view(T, N)


@pytest.fixture
def recorded():
    """A recorded launcher that counts its calls."""
    swiglu_of.calls = 0
    run = repeat.Repeat(swiglu_of)
    run(*halves(), *Extras())
    assert swiglu_of.calls == 1 and run.record.launches
    run(*halves(), *Extras())
    assert swiglu_of.calls == 1, "the second call is repeated"
    return run


def test_addresses_that_the_code_was_not_compiled_for(recorded):
    gate, up = halves(offset=1)
    assert torch.equal(recorded(gate, up, *Extras()), swiglu(gate.clone(), up.clone()))
    assert swiglu_of.calls == 2


def test_a_record_of_addresses_off_16_bytes_serves_all():
    swiglu_of.calls = 0
    run = repeat.Repeat(swiglu_of)
    run(*halves(offset=1), *Extras())
    gate, up = halves()
    if DEVICE == "cpu":
        assert run.record.aligned == []
    assert torch.equal(run(gate, up, *Extras()), swiglu(gate, up))
    assert swiglu_of.calls == 1


def test_a_launch_hook_sees_every_launch(recorded):
    hooks, seen = repeat.triton.knobs.runtime.launch_enter_hook, []
    hooks.add(seen.append)
    try:
        recorded(*halves(), *Extras())
    finally:
        hooks.remove(seen.append)
    assert swiglu_of.calls == 2 or seen
    recorded(*halves(), *Extras())
    assert swiglu_of.calls == 2


def test_one_tensor_in_two_places_is_no_model_for_later_calls():
    swiglu_of.calls = 0
    run = repeat.Repeat(swiglu_of)
    gate, up = halves()
    assert torch.equal(run(gate, gate, *Extras()), swiglu(gate, gate.clone()))
    assert run.record is None
    assert torch.equal(run(gate, up, *Extras()), swiglu(gate, up))
    assert torch.equal(run(up, gate, *Extras()), swiglu(up, gate))
    assert torch.equal(run(up, up, *Extras()), swiglu(up, up.clone()))
    assert swiglu_of.calls == 2


def test_tensors_of_somebody_else_are_not_recorded():
    calls = []

    def launcher(act, w_down):
        calls.append(act)
        return down_split(act * 2, w_down)  # a product of a tensor that the recorder does not know

    run, case = repeat.Repeat(launcher), case_of((16, 136, 200))
    act, w_down = case.act.to(DEVICE), case.w_down.to(DEVICE)
    expected = down_split(act * 2, w_down)
    for _ in range(2):
        assert torch.equal(run(act, w_down), expected)
    assert len(calls) == 2 and run.record is repeat.INCOMPLETE


@pytest.mark.parametrize("T", [1, 16])
def test_gate_and_up_that_lie_elsewhere(T):
    """The distance between two weights is an argument; where its kind (alignment) changes, the launcher runs again."""
    case, calls = case_of((T, 136, 200)), []

    def launcher(x, w_gate, w_up):
        calls.append(x)
        return gate_up_decode(x, (w_gate, w_up))

    run, x = repeat.Repeat(launcher), case.x.to(DEVICE)
    w_gate, w_up = (half.clone().to(DEVICE) for half in case.w_gate_up.chunk(2))
    expected = run(x, w_gate, w_up)
    (kind,) = [kind for *_, kind in run.record.distances]
    space = torch.empty(4 * w_up.numel() + 3, dtype=w_up.dtype, device=DEVICE)
    for offset in (16 * 7, 16 * 9, 8, 3):
        elsewhere = space[offset : offset + w_up.numel()].view_as(w_up).copy_(w_up)
        before = len(calls)
        assert torch.equal(run(x, w_gate, elsewhere), expected)
        same_kind = repeat._kind_of_int(launch.distance(w_gate, elsewhere)) == kind
        on_16_bytes = elsewhere.data_ptr() % 16 == 0
        assert len(calls) == before + (not (same_kind and on_16_bytes))


@pytest.mark.parametrize("op", OPS)
def test_rows_off_16_bytes_do_not_depend_on_the_calls_before(op):
    """down_proj and gated_mlp choose kernels by TMA: an address decides for its own call, never for later calls."""
    for name in plan.PLANS.get(op, [None]):
        shape = (70, 136, 72)
        if name and not servable(op, name, shape, torch.bfloat16):
            continue
        plans.use(name and f"{op}={name}")
        case = case_of(shape)
        aligned = [part.to(DEVICE) for part in case.inputs(op)]
        results = []
        for order in (0, 1):
            plans.forget()
            both = {}
            for shift in ((0, 1), (1, 0))[order]:
                space = torch.zeros(aligned[0].shape[0] * 144 + 8, dtype=torch.bfloat16, device=DEVICE)
                first = space[shift:].as_strided(aligned[0].shape, (144, 1), shift).copy_(aligned[0])
                both[shift] = getattr(ops, op)(first, *aligned[1:], backend="triton")
            results.append(both)
        for shift in (0, 1):
            assert torch.equal(results[0][shift], results[1][shift]), f"{name} {shift}"


@pytest.mark.parametrize("name", ["tma", "blas"])
@pytest.mark.parametrize("rows", ["steered", "none"])
def test_down_proj_leaves_act_as_it_was(name, rows):
    """act is scaled in place for the product and restored afterwards, bit for bit, NaN and infinity included."""
    plans.use(f"down_proj={name}")
    case = case_of((70, 1032, 72))
    act, w_down = case.act.to(DEVICE), case.w_down.to(DEVICE)
    extras = on_device(dict(scale=case.scale, row_circuit=case.row_circuit))
    if rows == "none":
        extras["row_circuit"].fill_(-1)
    for value in (torch.inf, torch.nan, -0.0):
        act[torch.from_numpy(case.multipliers() != 1).to(DEVICE)] = value
        before = act.view(torch.int16).clone()
        for _ in range(2):  # the first call is recorded, the second repeated
            ops.down_proj(act, w_down, **extras, backend="triton")
            assert torch.equal(act.view(torch.int16), before)


def test_rows_in_one_place_are_copied_before_they_are_scaled():
    plans.use("down_proj=blas")
    case = case_of((5, 136, 24))
    act = case.act[:1].to(DEVICE).expand(5, -1)
    w_down = case.w_down.to(DEVICE)
    extras = on_device(dict(scale=case.scale, row_circuit=torch.tensor([0, 3, -1, 3, 2], dtype=torch.int32)))
    got = ops.down_proj(act, w_down, **extras, backend="triton")
    assert torch.equal(got, ops.down_proj(act.contiguous(), w_down, **extras, backend="triton"))


def test_empty_calls_launch_nothing():
    y = triton_ops.prepare("down_proj", (torch.empty(0, 48), torch.randn(24, 48)), Extras())
    assert y(torch.empty(0, 48), torch.randn(24, 48), *Extras()).shape == (0, 24)


@pytest.mark.parametrize("name", ["tma", "blas"])
def test_act_is_put_back_where_the_product_fails(monkeypatch, name):
    plans.use(f"down_proj={name}")
    case = case_of((70, 136, 72))
    act, w_down = case.act.to(DEVICE), case.w_down.to(DEVICE)
    extras, before = on_device(dict(scale=case.scale, row_circuit=case.row_circuit)), act.clone()

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(launch, "linear", out_of_memory)
    monkeypatch.setattr(down_proj, "_product", out_of_memory)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            ops.down_proj(act, w_down, **extras, backend="triton")
        assert torch.equal(act, before)


@pytest.mark.parametrize("name", ["tma", "blas"])
def test_weights_in_the_memory_of_act_are_not_scaled(name):
    plans.use(f"down_proj={name}")
    case = case_of((70, 136, 72))
    act, extras = case.act.to(DEVICE), on_device(dict(scale=case.scale, row_circuit=case.row_circuit))
    for w_down in (act, act[8:48], case.w_down.to(DEVICE)):
        got = ops.down_proj(act, w_down, **extras, backend="triton")
        assert torch.equal(got, ops.down_proj(act, w_down.clone(), **extras, backend="triton"))


@pytest.mark.parametrize("name", ["tma", "blas"])
def test_a_scale_of_another_model_touches_no_other_row(name):
    """Indices beyond N, and more entries than a row has neurons: what `Scale` forbids stays within its row."""
    plans.use(f"down_proj={name}")
    case = case_of((70, 136, 72))
    act, w_down = case.act.to(DEVICE), case.w_down.to(DEVICE)
    before, plain = act.clone(), ops.down_proj(act, w_down, backend="triton")
    index = torch.arange(100, 340, dtype=torch.int32, device=DEVICE)
    scale = Scale(torch.tensor([[0, 240]], dtype=torch.int32, device=DEVICE), index, torch.zeros_like(index).float())
    rows = torch.full((70,), -1, dtype=torch.int32, device=DEVICE)
    rows[3] = 0
    y = ops.down_proj(act, w_down, scale=scale, row_circuit=rows, backend="triton")
    others = torch.arange(70) != 3
    assert torch.equal(act, before) and torch.equal(y[others], plain[others]) and not torch.equal(y[3], plain[3])


@pytest.mark.parametrize("kind", ["none", "function"])
def test_what_may_stand_in_the_place_of_launch_hooks(monkeypatch, recorded, kind):
    seen = []
    hook = None if kind == "none" else seen.append
    monkeypatch.setattr(repeat.triton.knobs.runtime, "launch_enter_hook", hook)
    gate, up = halves()
    if DEVICE == "cpu" or kind == "none":
        assert torch.equal(recorded(gate, up, *Extras()), swiglu(gate, up))
    assert swiglu_of.calls == (1 if kind == "none" else 2)
