"""attach beside adapters, quantised layers, accelerate, hooks and training; attaching, detaching, and bad input."""

import copy
import gc
import pickle
import random
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

from attach_cases import (
    MODELS,
    Int8Linear,
    L,
    assert_steered,
    assert_steered_as_hooks,
    hooked,
    ids_of,
    logits,
    make,
    quietly,
    random_circuit,
    transformers,
)
from cna_kernels import Circuit, InputError, attach, attached
from tiny import SHAPE

# Beside other libraries' changes to the model.


def lora(model, targets):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return wrapped.eval()


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "q_proj"], ["up_proj", "down_proj"]])
def test_adapters_of_peft(targets, attach_first):
    torch.manual_seed(0)
    model, ids = make("llama"), ids_of(2, 9)
    if attach_first:
        engine = attach(model)
        wrapped = lora(model, targets)
    else:
        wrapped = lora(model, targets)
        with pytest.warns(UserWarning, match=r"layers 0-2: \w+_proj is peft\.Linear"):
            engine = attach(wrapped)
    assert attached(wrapped) is engine
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [-2.0])
    engine.rows(0)
    got = logits(wrapped, ids)
    engine.detach()
    plain = logits(wrapped, ids)
    # by definition the adapter sees the steered act, too
    expected = hooked(wrapped.get_base_model(), circuit, -2.0, lambda _: logits(wrapped, ids))
    assert_steered(got, expected, plain)


@pytest.mark.parametrize("names", [["down_proj"], ["gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("model_name", ["llama", "gemma"])
def test_quantised_layers(model_name, names):
    model, ids = make(model_name), ids_of(2, 9)
    for layer in model.model.layers:
        for name in names:
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
    plain = logits(model, ids)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"layers 0-2: .*down_proj is attach_cases\.Int8Linear"):
        engine = attach(model)
    circuit = random_circuit(engine, 0)
    engine.set([circuit], [-2.0])
    engine.rows(0)
    assert_steered(logits(model, ids), hooked(model_of(model), circuit, -2.0, lambda m: logits(m, ids)), plain)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")
    model, ids = make("llama", hidden_size=64, intermediate_size=128), ids_of(2, 9)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            sizes, weight = (linear.in_features, linear.out_features), linear.weight.data.clone()
            if bits == 8:
                ours = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                ours.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                ours = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4")
                ours.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            setattr(layer.mlp, name, ours.to("cpu"))
    plain = logits(model, ids)
    with pytest.warns(UserWarning, match=r"layers 0-2: .*down_proj is bitsandbytes\.Linear"):
        engine = attach(model)
    assert torch.allclose(logits(model, ids), plain, atol=1e-4)
    assert_steered_as_hooks(model, engine, ids, plain)


def test_layers_without_parameters():
    """PyTorch's own dynamic quantisation leaves layers without weight parameters."""
    model, ids = make("llama"), ids_of(2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    plain, engine = logits(model, ids), quietly(model)
    assert_steered_as_hooks(model, engine, ids, plain, tolerance=0.02)


def model_of(model):
    """A plain copy: copies of attached models are plain."""
    plain = copy.deepcopy(model)
    assert attached(plain) is None
    return plain


@pytest.mark.parametrize("how", ["offload", "device_map"])
def test_accelerate(how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = make("llama"), ids_of(2, 9)
    plain = logits(model, ids)
    circuit = Circuit(tuple((layer, index, 1.0) for layer in range(L) for index in (1, 5, 9)), L, 48)
    expected = hooked(copy.deepcopy(model), circuit, -2.0, lambda m: logits(m, ids))
    if how == "offload":
        model = accelerate.cpu_offload(model, execution_device="cpu")
        assert next(model.model.layers[0].mlp.down_proj.parameters()).is_meta
    else:
        model.save_pretrained(tmp_path)
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(L)}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=places, offload_folder=tmp_path / "offload"
        ).eval()
    forward = model.model.layers[1].mlp.__dict__.get("forward")
    engine = quietly(model)
    assert engine.not_fused()
    engine.set([circuit], [-2.0])
    engine.rows(0)
    assert_steered(logits(model, ids), expected, plain)
    engine.rows(None)
    assert torch.allclose(logits(model, ids), plain, atol=1e-5)
    engine.detach()
    assert model.model.layers[1].mlp.__dict__.get("forward") == forward
    assert torch.allclose(logits(model, ids), plain, atol=1e-5)


def test_hooks_of_others_still_run():
    """Hooks on layers inside the MLP, put there before or after attach, see and change what they would without it."""
    model, ids = make("llama"), ids_of(2, 9)
    seen = []

    def put_hooks(m):
        m.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        m.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: 2 * _[2])
        m.model.layers[2].mlp.register_forward_hook(lambda *_: 0.5 * _[2])

    other = copy.deepcopy(model)
    put_hooks(other)
    expected = logits(other, ids)
    engine = attach(model)
    put_hooks(model)
    seen.clear()
    assert torch.allclose(logits(model, ids), expected, atol=1e-5) and len(seen) == 1
    assert engine.not_fused() == [
        "layer 0: down_proj has a bias, a hook or an unusual weight",
        "layer 1: gate_proj has a bias, a hook or an unusual weight",
    ]
    assert not torch.allclose(expected, logits(make("llama"), ids), atol=1e-2)


def test_training_through_an_attached_model():
    model, ids = make("llama"), ids_of(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    engine = attach(model)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    engine.set([random_circuit(engine, 0)], [-2.0])
    engine.rows(0)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    name = "model.layers.0.mlp.gate_proj.weight"
    assert (dict(model.named_parameters())[name].grad - expected[name]).abs().max() > 1e-3


def test_autocast():
    model, ids = make("llama"), ids_of(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = logits(model, ids).float()
        engine = attach(model)
        assert (logits(model, ids).float() - plain).abs().max() <= 0.03 * plain.abs().max()
        engine.set([random_circuit(engine, 0)], [-2.0])
        engine.rows(0)
        assert (logits(model, ids).float() - plain).abs().max() > 0.1 * plain.abs().max()


def test_many_circuits_while_others_come_and_go():
    """Forward passes while another thread adds, replaces and removes circuits: every pass sees one state of them."""
    model, ids = make("llama"), ids_of(8, 4)
    engine = attach(model, max_circuits=40, max_entries=1000)
    kept = [random_circuit(engine, seed) for seed in range(8)]
    engine.set(kept, -2.0)
    engine.rows(range(8))
    expected = logits(model, ids)
    stop, rounds = threading.Event(), [0]

    def churn():
        rng, own = random.Random(0), []
        while not stop.is_set():
            if own and rng.random() < 0.5:
                engine.table.remove(own.pop(rng.randrange(len(own))))
            elif len(own) < 30:
                own.append(engine.table.add(random_circuit(engine, rng.randrange(1000), size=8), 0.0))
            rounds[0] += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(60):
            assert torch.equal(logits(model, ids), expected)
    finally:
        stop.set()
        thread.join()
    assert rounds[0] > 20


def test_1024_circuits_in_one_batch():
    model, ids = make("llama"), ids_of(1024, 2)
    engine = attach(model, max_circuits=1024, max_entries=1024 * 4)
    circuits = [random_circuit(engine, seed, size=4) for seed in range(1024)]
    engine.set(circuits, [-2.0 - 0.001 * seed for seed in range(1024)])
    engine.rows(range(1024))
    got = logits(model, ids)
    for row in (0, 511, 1023):
        engine.rows(row)
        assert torch.allclose(logits(model, ids[row : row + 1])[0], got[row], atol=1e-4)
    engine.rows(None)
    assert ((logits(model, ids) - got).abs().amax((1, 2)) > 1e-3).double().mean() > 0.9


# Attaching and detaching.


def traces(model):
    return {name: sorted(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_and_nothing_is_saved(name, tmp_path):
    model = make(name)
    before, parameters = traces(model), [id(x) for x in model.parameters()]
    model.save_pretrained(tmp_path / "plain")
    engine = quietly(model)
    engine.set([random_circuit(engine, 0)], [0.0])
    engine.rows(0)
    model.save_pretrained(tmp_path / "attached")
    for file in sorted((tmp_path / "plain").iterdir()):
        assert (tmp_path / "attached" / file.name).read_bytes() == file.read_bytes()
    engine.detach()
    assert traces(model) == before and [id(x) for x in model.parameters()] == parameters
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None, "detached, nothing may hold it"


def test_copies_are_plain():
    model, ids = make("llama"), ids_of(1, 5)
    plain = logits(model, ids)
    engine = attach(model, backend="reference")
    engine.set([random_circuit(engine, 0)], [0.0])
    engine.rows(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert attached(other) is None and torch.equal(logits(other, ids), plain)
        again = attach(other, backend="reference")
        assert torch.equal(logits(other, ids), plain)
        again.detach()
    assert not torch.equal(logits(model, ids), plain)


def test_detaching_in_another_order():
    model, ids = make("llama"), ids_of(1, 5)
    engine = attach(model)
    mlp = model.model.layers[1].mlp
    ours = mlp.forward
    mlp.forward = lambda x: 2 * ours(x)
    with pytest.raises(InputError, match=r"the forward of layers\[1\]'s MLP was replaced after attach; take that off"):
        engine.detach()
    assert attached(model) is engine
    mlp.forward = ours
    engine.detach()
    mlp.forward = lambda x: x
    engine = quietly(model)
    assert engine.not_fused()[0].startswith("layer 1: its forward is its own, test_detaching_in_another_order")
    with pytest.raises(InputError, match=r"layers\[1\]: its MLP's forward, .*<lambda>, called down_proj 0 times"):
        logits(model, ids)
    engine.detach()
    assert logits(model, ids) is not None and attached(model) is None
    model.model.forward = lambda *_, **__: None
    with pytest.raises(InputError, match="the forward of the decoder was replaced by something else; take that off"):
        attach(model)


def test_a_detached_engine_says_so():
    model = make("llama")
    old = attach(model)
    old.detach()
    new = attach(model)
    for call in (old.detach, lambda: old.rows(None), lambda: old.collect(torch.eye(2)).__enter__()):
        with pytest.raises(InputError, match="engine: was detached from its model"):
            call()
    assert attached(model) is new


def test_attach_to_the_decoder_or_a_compiled_model():
    model, ids = make("llama"), ids_of(1, 5)
    engine = attach(model.model)
    assert attached(model) is engine
    engine.detach()
    compiled = torch.compile(model, backend="eager")
    engine = attach(compiled)
    assert attached(model) is engine and logits(compiled, ids).shape == (1, 5, SHAPE["vocab_size"])


def test_refusals():
    model, ids = make("llama"), ids_of(2, 5)
    engine = attach(model, max_circuits=2, max_entries=50, max_rows=3)
    circuit = random_circuit(engine, 0)
    other = Circuit(((0, 1, 1.0),), L, 50)
    for message, call in {
        "model: an engine is attached already": lambda: attach(model),
        "circuit: n_neurons: made for another model: expected 48, got 50": lambda: engine.set([other], [0.0]),
        "table: holds 2 circuits already; see max_circuits": lambda: engine.set([circuit] * 3, 0.0),
        "table: has room for 50 neurons, 24 are in use": lambda: engine.set([circuit, random_circuit(engine, 1, 30)]),
        "multiplier: expected a finite number": lambda: engine.set([circuit], [float("nan")]),
        "multipliers: expected 1, one for each circuit, got 2": lambda: engine.set([circuit], [0.0, 1.0]),
        "row_circuit: row 0: expected -1 or one of none, got 0": lambda: engine.rows(0),
        "row_circuit: 4 rows, attached with max_rows=3": lambda: engine.rows([-1] * 4),
        "row_circuit: expected whole numbers": lambda: engine.rows([0.5]),
        "phase: expected one of both, prompt, answer, got 'prefill'": lambda: engine.rows(None, phase="prefill"),
        "start: expected one position, or one for each of 2 rows": lambda: engine.rows([-1, -1], start=[1, 2, 3]),
        "rows: the batch has 4, attached with max_rows=3": lambda: logits(model, ids_of(4, 5)),
        "exclude: (0, 48) is no neuron": lambda: engine.select(engine.new_sums(2), exclude=[(0, 48)]),
        "max_rows: expected 1 to": lambda: attach(make("qwen2"), max_rows=0),
        "backend: expected one of": lambda: attach(make("qwen2"), backend="cuda"),
    }.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message), str(caught.value)
        assert engine.table.n_circuits == 0
    engine.set([circuit], [0.0])
    engine.rows([0, -1, 0])
    with pytest.raises(InputError, match="rows: expected 2, one for each row of the batch, got 3"):
        logits(model, ids)
    with pytest.raises(InputError, match="an MLP ran outside its model's forward pass"):
        model.model.layers[0].mlp(torch.zeros(1, 1, 32))


def test_unknown_architectures_name_what_was_looked_for():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)
    with pytest.raises(InputError, match=r"GPT2LMHeadModel has no decoder with `layers`; supported: Llama, .*Mixtral"):
        attach(transformers.GPT2LMHeadModel(config))
    config = transformers.PhiConfig(**SHAPE)
    with pytest.raises(InputError, match=r"layers\[0\], a PhiDecoderLayer, has no MLP that is known \(gate_proj or"):
        attach(transformers.PhiForCausalLM(config))
    config = transformers.Qwen2MoeConfig(
        **SHAPE, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts_per_tok=2
    )
    with pytest.raises(InputError, match=r"layers\[0\], a Qwen2MoeDecoderLayer, has several MLPs"):
        attach(transformers.Qwen2MoeForCausalLM(config))


def test_the_package_gives_attach_whatever_was_imported_first():
    import cna_kernels.engine

    assert callable(cna_kernels.attach) and cna_kernels.attach is attach
