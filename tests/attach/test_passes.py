"""Passes and what runs again: gradient checkpointing, passes in passes, MLPs outside of passes, early ends."""

import gc
import inspect
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attach_cases import DENSE, ids_of, logits, make, quietly, random_circuit
from cna_kernels import InputError, attach

IDS = ids_of(2, 7)


def loss_of(model, ids=IDS):
    return model(ids, labels=ids, use_cache=False).loss


# Between the forward and the backward pass.


def another_pass(model, engine, circuits):
    return 2 * loss_of(model)


def another_shape(model, engine, circuits):
    return loss_of(model, ids_of(2, 5)) + loss_of(model, ids_of(2, 9))


def without_gradients(model, engine, circuits):
    with torch.no_grad():
        model(IDS[:, :4])


def an_answer(model, engine, circuits):
    model.eval()
    model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.train()


def other_rows(model, engine, circuits):
    engine.rows([1, 0])
    return -2 * loss_of(model)


def no_rows(model, engine, circuits):
    engine.rows(None)


def rows_by_token(model, engine, circuits):
    engine.rows([[0] * 3 + [-1] * 4, [1] * 7])
    loss = loss_of(model)
    engine.rows(None)
    return loss


def another_multiplier(model, engine, circuits):
    engine.table.set_multiplier(0, 1.0)


def other_circuits(model, engine, circuits):
    engine.set([circuits[2]], [4.0])
    engine.rows([0, 0])
    return loss_of(model)


def a_circuit_replaced(model, engine, circuits):
    engine.table.replace(0, circuits[2], 3.0)


def a_circuit_removed(model, engine, circuits):
    engine.table.remove(0)


def steered_for_a_while(model, engine, circuits):
    with engine.steer(circuits[2], 5.0):
        return loss_of(model)


def a_sum(model, engine, circuits):
    with torch.no_grad(), engine.collect(torch.eye(2)):
        model(IDS)


def a_lost_pass(model, engine, circuits):
    loss_of(model)
    engine.rows([1, 1])


BETWEEN = [
    another_pass, another_shape, without_gradients, an_answer, other_rows, no_rows, rows_by_token, another_multiplier,
    other_circuits, a_circuit_replaced, a_circuit_removed, steered_for_a_while, a_sum, a_lost_pass,
]  # fmt: skip


def gradients(between, reentrant, name="llama"):
    model = make(name).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    engine = quietly(model)
    circuits = [random_circuit(engine, seed) for seed in range(3)]
    engine.set(circuits[:2], [-2.0, 3.0])
    engine.rows([0, -1])
    loss = loss_of(model)
    more = between(model, engine, circuits)
    (loss if more is None else loss + more).backward()
    return torch.cat([x.grad.flatten() for x in model.parameters()])


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_layers_that_run_again_belong_to_their_own_pass(between):
    """The gradients of gradient checkpointing are those without it, whatever comes between forward and backward."""
    expected = gradients(between, None)
    for reentrant in (True, False):
        got = gradients(between, reentrant)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), reentrant


@pytest.mark.parametrize("name", ["gemma", "phi3", "qwen3-moe"])
def test_other_models_run_again(name):
    expected = gradients(other_rows, None, name)
    for reentrant in (True, False):
        assert (gradients(other_rows, reentrant, name) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_reference_pass_of_an_adapter():
    peft = pytest.importorskip("peft")
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(make("llama").train(), config)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        engine = quietly(model)
        engine.set([random_circuit(engine, 0)], [-2.0])
        engine.rows([0, -1])
        loss = loss_of(model)
        engine.rows(None)
        with torch.no_grad(), model.disable_adapter():
            model(IDS)
        loss.backward()
        found.append(torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None]))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model(reentrant):
    found = []
    for around in (False, True):
        model = make("llama").train()
        engine = quietly(model)
        engine.set([random_circuit(engine, 0)], [-2.0])
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

        def run(embeds, model=model):
            return model(inputs_embeds=embeds, use_cache=False).logits

        engine.rows([0, -1])
        y = checkpoint(run, embeds, use_reentrant=reentrant) if around else run(embeds)
        engine.rows([-1, 0])
        if around and reentrant:
            with pytest.raises(InputError, match="rows: a checkpoint around the whole model runs it again"):
                y.sum().backward()
            return
        y.sum().backward()
        found.append(embeds.grad)
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


@pytest.mark.exhaustive
@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_layers_run_again(reentrant, monkeypatch):
    """A checkpoint around layers that are compiled, as transformers before 5.20 has it: a compiler sees no node."""

    def run(checkpointed, compiled):
        torch._dynamo.reset()
        model = make("llama", num_hidden_layers=2).train()
        engine = quietly(model)
        engine.set([random_circuit(engine, seed) for seed in range(2)], [-2.0, 3.0])
        for layer in model.model.layers if compiled else ():
            layer.compile(backend="aot_eager")
        kind = type(model.model.layers[0])
        with monkeypatch.context() as patch:
            if checkpointed:
                patch.setattr(kind, "__call__", lambda self, x, **more: checkpoint(
                    lambda x: torch.nn.Module.__call__(self, x, **more), x, use_reentrant=reentrant
                ), raising=False)  # fmt: skip
            engine.rows([0, -1])
            loss = loss_of(model)
            engine.rows([1, 0])
            loss = loss - 2 * loss_of(model)
            engine.rows(None)
            loss.backward()
        return torch.cat([x.grad.flatten() for x in model.parameters()])

    expected = run(checkpointed=False, compiled=False)
    assert (run(checkpointed=True, compiled=True) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_nothing_is_kept_of_a_pass_whose_graph_is_gone():
    model = make("llama").train()
    engine = quietly(model)
    losses = [loss_of(model) for _ in range(3)]
    graded = engine._now.graded
    assert len(graded) == 3
    del losses
    gc.collect()
    assert not any(ref() for ref in graded)
    loss = loss_of(model)
    assert len(engine._now.graded) == 1 and loss.requires_grad


# Sums.


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_whose_pass_is_gone_do_not_run_again(reentrant):
    """A hook keeps what a layer gave, and nobody keeps what the model gave."""
    model, kept = make("llama").train(), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    engine = attach(model)
    circuit = random_circuit(engine, 0)
    model.model.layers[1].register_forward_hook(lambda *args: kept.append(args[2]))
    with engine.steer(circuit, -2.0):
        model(IDS, use_cache=False)
    gc.collect()
    with pytest.raises(InputError, match="its pass is gone, with the rows that were steered; keep what the model"):
        kept[0].sum().backward()
    kept.clear()
    with engine.steer(circuit, -2.0):
        out = model(IDS, use_cache=False)
    kept[0].sum().backward()
    assert out.logits.grad_fn is not None
    with pytest.warns(UserWarning, match="layers that its backward pass runs again run unsteered now"):
        engine.detach()


def test_layers_that_did_not_run_are_an_error():
    model = make("llama")
    engine = attach(model)
    sums = engine.new_sums(2)
    with engine.collect(torch.eye(2), sums):
        logits(model, IDS, output_hidden_states=True)
    total, count = sums.total.clone(), sums.count.clone()
    model.config.num_hidden_layers = 2
    with pytest.raises(InputError, match="collect: layer 2 did not run in the pass, so that nothing was counted"):  # noqa: SIM117
        with engine.collect(torch.eye(2), sums):
            logits(model, IDS)
    assert torch.equal(sums.total, total) and torch.equal(sums.count, count)
    model.config.num_hidden_layers = 3
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda module, x, y: module.forward(*x))
    with pytest.raises(InputError, match="collect: layer 1 ran 2 times in the pass"):  # noqa: SIM117
        with engine.collect(torch.eye(2), sums):
            logits(model, IDS)
    handle.remove()
    with engine.collect(torch.eye(2), sums):
        logits(model, IDS)
    assert torch.equal(sums.total, 2 * total)


def test_mlps_that_layers_do_not_call_are_not_steered_in_silence():
    def past_the_mlp(self, x, **_):
        return x + self.mlp.down_proj(self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))

    model = make("llama")
    engine = attach(model)
    layers = model.model.layers
    layers[1].forward = past_the_mlp.__get__(layers[1])
    logits(model, IDS)
    with engine.steer(random_circuit(engine, 0)):
        with pytest.warns(UserWarning, match="the MLPs of layer 1 did not run in a pass whose rows are steered; their"):
            logits(model, IDS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(model, IDS)
            for layer in layers:
                layer.forward = past_the_mlp.__get__(layer)
            with pytest.raises(InputError, match="none of its MLPs ran in a pass whose rows are steered"):
                logits(model, IDS)
    logits(model, IDS)


def test_assisted_decoding_by_an_early_exit():
    model = make("llama")
    engine = attach(model)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, assistant_early_exit=1)
    with pytest.raises(InputError, match="collect: layers 1-2 did not run"):  # noqa: SIM117
        with engine.collect(torch.eye(1)):
            model.generate(IDS[:1], **options)
    with engine.steer(random_circuit(engine, 0, size=60), -3.0):
        expected = model.generate(IDS[:1], **(options | dict(assistant_early_exit=None)))
        assert torch.equal(model.generate(IDS[:1], **options), expected)


def test_a_pass_within_a_pass():
    """A hook that runs the model again leaves the rows and sums of the pass around it alone."""
    model = make("llama")
    engine = attach(model)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows(0)
    expected = logits(model, IDS)
    with engine.collect(torch.eye(2)) as sums:
        logits(model, IDS)
    busy = []

    def again(*_):
        if not busy:
            busy.append(True)
            logits(model, IDS[:, :3])
            busy.clear()

    model.model.layers[1].register_forward_pre_hook(again)
    assert torch.equal(logits(model, IDS), expected)
    with engine.collect(torch.eye(2)) as nested:
        logits(model, IDS)
    assert torch.equal(nested.total, sums.total)


# Outside of passes.


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("graded", [True, False])
def test_an_mlp_outside_its_model(name, graded):
    model, x = make(name), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    mlp = model.model.layers[0].mlp
    with torch.set_grad_enabled(graded):
        expected = mlp(x)
        engine = attach(model)
        assert torch.equal(mlp(x), expected), "no rows yet"
        engine.set([random_circuit(engine, 0)], [-2.0])
        engine.rows(0)
        model(IDS)
        with pytest.raises(InputError, match="an MLP ran outside its model's forward pass, where no row is known"):
            mlp(x)
        engine.rows(None)
        assert torch.equal(mlp(x), expected), "rows of an earlier pass"
        engine.rows([-1, -1])
        assert torch.equal(mlp(x), expected)


# Steering for a while.


def test_steer_is_set_and_rows_for_a_while():
    model = make("llama")
    engine = attach(model)
    plain, circuits = logits(model, IDS), [random_circuit(engine, seed) for seed in range(3)]
    engine.set(circuits[:2], [-2.0, 3.0])
    engine.rows([1, -1], start=2)
    before = logits(model, IDS)
    engine.rows(0)
    all_rows = logits(model, IDS)
    engine.rows([1, -1], start=2)
    with engine.steer(circuits[0], -2.0) as numbers:
        assert numbers == [0] and engine.table.numbers == [0] and torch.equal(logits(model, IDS), all_rows)
        with engine.steer([circuits[2], circuits[1]], [0.0, 1.0], [1, -1]) as numbers:
            assert numbers == [0, 1] and torch.allclose(logits(model, IDS), plain, atol=1e-5)
        assert torch.equal(logits(model, IDS), all_rows)
    assert engine.table.numbers == [0, 1] and torch.equal(logits(model, IDS), before)
    with pytest.raises(RuntimeError, match="planted"), engine.steer(circuits[0]):
        raise RuntimeError("planted")
    with pytest.raises(InputError, match="row_circuit: row 1: expected -1 or one of 0, got 1"):  # noqa: SIM117
        with engine.steer(circuits[0], rows=[0, 1]):
            pass
    with pytest.raises(InputError, match="rows: expected which of 2 circuits each row uses, got None"):  # noqa: SIM117
        with engine.steer(circuits[:2]):
            pass
    assert engine.table.numbers == [0, 1] and torch.equal(logits(model, IDS), before)


def test_circuits_without_rows_are_said_once():
    model = make("llama")
    engine = attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, IDS)
        engine.rows(None)
        engine.set([random_circuit(engine, 0)])
        logits(model, IDS)
        engine.detach()
        engine = attach(model)
        engine.set([random_circuit(engine, 0)])
        with pytest.raises(UserWarning, match=r"circuits are set, but no row uses one; call Engine\.rows"):
            logits(model, IDS)
        logits(model, IDS)


# What others see of an attached model.


@pytest.mark.parametrize("name", [*DENSE, "qwen3-moe", "mixtral"])
def test_signatures_stay(name):
    model = make(name)
    modules = dict(model.named_modules())
    before = {name: inspect.signature(module.forward) for name, module in modules.items()}
    quietly(model)
    assert {name: inspect.signature(module.forward) for name, module in modules.items()} == before


def test_wrong_arguments_are_the_errors_of_the_model():
    model = make("llama")
    mlp, x = model.model.layers[0].mlp, torch.zeros(1, 1, 32)
    for attached in (False, True):
        if attached:
            attach(model)
        for call in (lambda: mlp(x, x), lambda: mlp(), lambda: mlp(y=x)):
            with pytest.raises(TypeError):
                call()
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model()
