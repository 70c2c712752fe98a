"""Old names give what the new names give, and warn."""

import warnings

import pytest
import torch

from cna_kernels import ActivationSums, Circuit, SteeringTable, ops, plans
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


@pytest.mark.parametrize(("call", "old", "new"), [*op_calls(), pytest.param(fold, "weight", "token_weight", id="fold")])
def test_the_old_name_gives_the_same(call, old, new):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = call(new)
    with pytest.warns(DeprecationWarning, match=f"the argument {old} is now named {new}") as seen:
        found = call(old)
    assert seen[0].filename == __file__  # it names the caller's line
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_both_names_are_refused():
    case = make_case(7, 130, torch.float32)
    sums = torch.zeros(case.token_weight.shape[1], 130)
    with pytest.raises(TypeError, match="weight: is the old name of token_weight, and both were given"):
        ops.steer_act(case.act, token_weight=case.token_weight, weight=case.token_weight, act_sum=sums)
    function = renamed(before="now")(lambda **given: given)
    with pytest.raises(TypeError, match="before: is the old name of now, and both were given"):
        function(now=1, before=2)
    with pytest.warns(DeprecationWarning):
        assert function(before=2, other=3) == dict(now=2, other=3)


def test_rows_of_a_table():
    circuit = Circuit(((0, 1, 1.0),), 1, 4)
    table = SteeringTable([circuit], [0.0], 1, 4)
    assert torch.equal(table.rows([0, -1]), table.row_circuit([0, -1]))


def test_the_plan_engine_is_csrc():
    assert plans.read("gated_mlp=engine,linear=engine") == dict(gated_mlp="csrc", linear="csrc")


def test_names_of_the_model():
    pytest.importorskip("tokenizers")
    from cna_kernels.model.checkpoint import export
    from cna_kernels.model.evaluation import evaluate
    from cna_kernels.model.evaluation.suite import Suite
    from cna_kernels.model.transformer import Steer, Steering

    assert Steer is Steering and export.factors_of is export.neuron_multipliers
    with pytest.warns(DeprecationWarning, match="exam_tokens is now named choice_tokens"):
        suite = evaluate.Plan(text="a", exam_tokens=3)
    assert type(suite) is Suite and suite.choice_tokens == 3
