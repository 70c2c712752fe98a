"""attach: faults that would be silently wrong, or would break what works without an engine."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo import testing
from torch.nn.utils import prune

from attach_cases import assert_steered_as_hooks, ids_of, logits, make, quietly, random_circuit, transformers
from cna_kernels import InputError, attach
from tiny import SHAPE


def test_an_mlp_replaced_after_attach_is_noticed():
    ids = ids_of(2, 5)
    for replace in (
        lambda layer: setattr(layer.mlp, "forward", type(layer.mlp).forward.__get__(layer.mlp)),
        lambda layer: setattr(layer, "mlp", copy.deepcopy(layer.mlp)),
    ):
        model = make("llama")
        attach(model)
        logits(model, ids)
        replace(model.model.layers[1])
        with pytest.raises(InputError, match="was replaced after attach"):
            logits(model, ids)


def test_an_activation_that_is_hooked_or_replaced():
    ids = ids_of(2, 5)
    for name in ("llama", "qwen3-moe"):
        for change in (
            lambda mlp: mlp.act_fn.register_forward_hook(lambda _, arguments, y: 2 * y),
            lambda mlp: setattr(mlp, "act_fn", nn.GELU()),
        ):
            model = make(name)
            plain, engine = logits(model, ids), attach(model)
            mlp = model.model.layers[1].mlp
            change(mlp.experts if hasattr(mlp, "experts") else mlp)
            assert "layer 1: the activation" in engine.not_fused()[0]
            got = logits(model, ids)
            engine.detach()
            expected = logits(model, ids)
            assert torch.allclose(got, expected, atol=1e-5) and (expected - plain).abs().max() > 0.05


def test_experts_with_a_gate_of_their_own_are_refused():
    model = make("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    with pytest.raises(InputError, match=r"layers\[1\]: experts with a gate of their own"):
        attach(model)


def test_a_gate_beside_the_forward_of_its_experts_is_refused():
    model = make("mixtral")
    experts = model.model.layers[1].mlp.experts
    attach(model)
    gate_up = torch.zeros(1, experts.gate_up_proj.shape[1])
    model.model.layers[0].register_forward_pre_hook(lambda *_: experts._apply_gate(gate_up) and None)
    with pytest.raises(InputError, match="a mixture's gate ran outside its forward pass"):
        logits(model, ids_of(1, 3))


@pytest.mark.parametrize("change", [dict(has_bias=True), dict(has_gate=False), dict(_is_hooked=True)])
def test_experts_that_are_not_plain_are_refused(change):
    model = make("mixtral")
    vars(model.model.layers[1].mlp.experts).update(change)
    with pytest.raises(InputError, match=r"layers\[1\]: experts with a bias or a norm, transposed, without a gate or"):
        attach(model)


def test_layers_that_share_an_mlp_are_refused():
    model = make("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(InputError, match="two of its layers share an MLP"):
        attach(model)


def test_an_mlp_beside_another_is_refused():
    config = transformers.GraniteMoeSharedConfig(**SHAPE, num_local_experts=4, shared_intermediate_size=24)
    with pytest.raises(InputError, match=r"layers\[0\], a GraniteMoeSharedDecoderLayer, has"):
        attach(transformers.GraniteMoeSharedForCausalLM(config))


def test_weights_that_were_split_are_refused():
    """Weights as tensor parallelism leaves them: every rank has only some of the neurons."""
    model, ids = make("llama"), ids_of(2, 5)
    attach(model)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            getattr(layer.mlp, name).weight.data = getattr(layer.mlp, name).weight.data[:24]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :24].contiguous()
    with pytest.raises(InputError, match="down_proj takes 24 neurons here, 48 were expected; a model whose MLPs are"):
        logits(model, ids)


def test_weights_by_token_under_any_mask():
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    with engine.collect(torch.eye(2)) as expected:
        logits(model, ids)
    token_weight = torch.zeros(2, 5, 2)
    token_weight[:, -1] = torch.eye(2)
    with engine.collect(token_weight) as sums:
        logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(sums.total, expected.total, rtol=1e-4, atol=1e-5)


def test_a_pass_that_failed_may_be_tried_again():
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model)
    with engine.collect(torch.eye(2)) as expected:
        logits(model, ids)
    failing = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with engine.collect(torch.eye(2)) as sums:
        with pytest.raises(ZeroDivisionError):
            logits(model, ids)
        failing.remove()
        logits(model, ids)
    assert torch.equal(sums.total, expected.total) and torch.equal(sums.count, expected.count)


def test_large_numbers_do_not_wrap():
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model)
    plain = logits(model, ids)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows(0)
    steered = logits(model, ids)
    engine.rows(0, stop=2**63 - 1)
    assert torch.equal(logits(model, ids), steered)
    engine.rows(0, start=2**40)
    assert torch.allclose(logits(model, ids), plain, atol=1e-5) and (steered - plain).abs().max() > 0.1
    with pytest.raises(InputError, match="row_circuit: row 1: expected -1 or one of 0, got 4294967296"):
        engine.rows([-1, 2**32])


def test_accelerate_after_attach():
    accelerate = pytest.importorskip("accelerate")
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows(0)
    steered = logits(model, ids)
    model = accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.allclose(logits(model, ids), steered, atol=1e-5)
    engine.detach()
    assert torch.allclose(logits(model, ids), logits(make("llama"), ids), atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, ids = make("llama").train(), ids_of(2, 5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows([0, -1])
    model(ids, labels=ids, use_cache=False).loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_layers_compiled_one_by_one():
    """Regional compilation: one graph serves every layer, and follows changes of the table."""
    model, ids = make("llama", num_hidden_layers=12), ids_of(2, 5)
    engine = attach(model)
    engine.set([random_circuit(engine, 0, size=60)], [-2.0])
    engine.rows([0, -1])
    steered, plain = logits(model, ids), logits(make("llama", num_hidden_layers=12), ids)
    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    assert torch.allclose(logits(model, ids, use_cache=False), steered, atol=1e-4)
    assert counter.frame_count <= 2
    engine.table.set_multiplier(0, 1.0)
    assert torch.allclose(logits(model, ids, use_cache=False), plain, atol=1e-4)
    assert counter.frame_count <= 2


@pytest.mark.exhaustive
def test_batches_of_many_sizes_share_a_graph():
    model = make("llama", num_hidden_layers=2)
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for n_rows in range(2, 14):
        ids = ids_of(n_rows, 5)
        engine.rows([0, *[-1] * (n_rows - 1)])
        assert torch.allclose(logits(compiled, ids, use_cache=False), logits(model, ids, use_cache=False), atol=1e-4)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", ["reference", None])
def test_float64_pruned_and_strided_weights(backend):
    ids = ids_of(2, 5)
    for change in (
        lambda model: model.double(),
        lambda model: prune.l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", 0.3),
        lambda model: setattr(
            model.model.layers[0].mlp.up_proj, "weight",
            nn.Parameter(model.model.layers[0].mlp.up_proj.weight.detach().T.contiguous().T),
        ),
    ):  # fmt: skip
        model = make("llama")
        change(model)
        plain, engine = logits(model, ids), quietly(model, backend=backend)
        assert torch.allclose(logits(model, ids), plain, atol=1e-5)
        assert_steered_as_hooks(model, engine, ids, plain)


def test_nothing_is_kept_alive():
    model = make("llama")
    engine = attach(model)
    logits(model, ids_of(2, 5))
    engine.detach()
    freed = weakref.ref(model.model.layers[0].mlp.down_proj.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert freed() is None and engine.table is not None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_follows_the_table():
    """A captured decoding step: another multiplier, circuit or row changes what a replay gives."""
    model, ids = make("llama", torch.bfloat16).cuda(), ids_of(2, 9).cuda()
    engine = attach(model)
    engine.set([random_circuit(engine, 0), random_circuit(engine, 1)], [-2.0, 4.0])
    engine.rows([0, 1])
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(ids, use_cache=False).logits
    seen = []
    for change in (
        lambda: None,
        lambda: engine.table.set_multiplier(0, 0.0),
        lambda: engine.table.replace(1, random_circuit(engine, 2), -2.0),
        lambda: engine.rows([1, 0]),
    ):
        change()
        graph.replay()
        got = out.float().clone()
        assert torch.allclose(got, logits(model, ids, use_cache=False).float(), atol=0.05)
        assert not seen or (got - seen[-1]).abs().max() > 0.1
        seen.append(got)
