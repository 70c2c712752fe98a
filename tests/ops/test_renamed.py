"""Old names give what the new names give, and warn."""

import warnings

import pytest
import torch

from cna_kernels import ActivationSums, Circuit, SteeringTable, attach, ops, plans
from cna_kernels.renamed import renamed
from op_cases import make_case


def op_calls():
    case = make_case(7, 130, torch.float32)
    inputs = dict(
        gated_mlp=(case.x, case.w_gate_up, case.w_down), swiglu=(case.gate, case.up), down_proj=(case.act, case.w_down),
        steer_act=(case.act,),
    )  # fmt: skip
    for op, tensors in inputs.items():

        def call(name, op=op, tensors=tensors):
            sums = torch.ones(case.token_weight.shape[1], 130)
            y = getattr(ops, op)(*tensors, **{name: case.token_weight}, act_sum=sums)
            return y, sums

        yield pytest.param(call, "weight", "token_weight", id=op)


def fold(name):
    sums = ActivationSums(1, 4, 2)
    sums.fold(**{name: torch.tensor([[1.0, 2.0]])})
    return (sums.count,)


def tiny_engine():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    return model, attach(model)


@torch.no_grad()
def collect(name):
    model, engine = tiny_engine()
    with engine.collect(**{name: torch.eye(2)}) as sums:
        model(torch.arange(8).view(2, 4))
    return (sums.total,)


@torch.no_grad()
def rows(name):
    model, engine = tiny_engine()
    engine.set(Circuit(((0, 3, 1.0), (1, 7, 1.0)), 2, 24), 30.0)
    engine.rows(**{name: [-1, 0]})
    return (model(torch.arange(8).view(2, 4)).logits,)


def steered(name):
    pytest.importorskip("tokenizers")
    from cna_kernels.model import load
    from cna_kernels.model.demo.checkpoint import demo_checkpoint

    model, circuit = load(demo_checkpoint()), Circuit(((3, 435, 1.0),), 8, 1024)
    with model.steered(circuit, 9.0, **{name: [-1, 0]}):
        return (model(torch.tensor([[5, 6, 7], [5, 6, 7]])),)


def named(call, old, new):
    return pytest.param(call, old, new, id=call.__name__)


@pytest.mark.parametrize(
    ("call", "old", "new"),
    [
        *op_calls(),
        named(fold, "weight", "token_weight"),
        named(collect, "weight", "token_weight"),
        named(rows, "circuit_of_row", "row_circuit"),
        named(steered, "rows", "row_circuit"),
    ],
)
def test_the_old_name_gives_the_same(call, old, new):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cna_kernels: the argument")
        expected = call(new)
    with pytest.warns(DeprecationWarning, match=f"the argument {old} is now named {new}") as seen:
        found = call(old)
    assert [w.filename for w in seen if "cna_kernels" in str(w.message)] == [__file__]  # the caller's line
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_both_names_are_refused():
    case = make_case(7, 130, torch.float32)
    sums = torch.zeros(case.token_weight.shape[1], 130)
    with pytest.raises(TypeError, match="weight: is the old name of token_weight, and both were given"):
        ops.steer_act(case.act, token_weight=case.token_weight, weight=case.token_weight, act_sum=sums)
    function = renamed(before="now")(lambda **given: given)
    with pytest.raises(TypeError, match="before: is the old name of now, and both were given"):
        function(now=1, before=2)
    with pytest.raises(TypeError, match="both were given"):
        function(now=None, before=2)
    with pytest.warns(DeprecationWarning):
        assert function(before=2, other=3) == dict(now=2, other=3)


def test_an_old_name_breaks_no_graph():
    case, sums = make_case(7, 130, torch.float32), [torch.ones(3, 130) for _ in range(2)]
    assert case.token_weight.shape[1] == 3

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(act, weight, act_sum):
        return ops.steer_act(act, weight=weight, act_sum=act_sum)

    compiled(case.act, case.token_weight, sums[0])
    ops.steer_act(case.act, token_weight=case.token_weight, act_sum=sums[1])
    assert torch.equal(*sums) and (sums[0] != 1).any()


def test_rows_of_a_table():
    circuit = Circuit(((0, 1, 1.0),), 1, 4)
    table = SteeringTable([circuit], [0.0], 1, 4)
    assert torch.equal(table.rows([0, -1]), table.row_circuit([0, -1]))


def test_the_plan_engine_is_csrc():
    assert plans.read("gated_mlp=engine,linear=engine") == dict(gated_mlp="csrc", linear="csrc")


def test_names_of_the_model():
    pytest.importorskip("tokenizers")
    from cna_kernels.model.checkpoint import export
    from cna_kernels.model.evaluation import evaluate, multiple_choice
    from cna_kernels.model.evaluation.suite import Suite
    from cna_kernels.model.transformer import Steer, Steering

    assert Steer is Steering and export.factors_of is export.neuron_multipliers
    assert multiple_choice.Exam is multiple_choice.MultipleChoice
    questions = multiple_choice.Exam((), {}, {})
    with pytest.warns(DeprecationWarning, match="exam_tokens is now named choice_tokens"):
        suite = evaluate.Plan(exam=questions, exam_tokens=3, rows=2)
    assert isinstance(suite, Suite) and suite.multiple_choice is questions
    assert (suite.choice_tokens, suite.batch) == (3, 2)
