"""attach against plain transformers: what people do to a model and around a pass, each a line of data.

A case changes a model, before attach or after, or the way it is called. A twin, changed in the same way and never
attached, has the right values: its logits, its logits with hooks that scale the inputs of ``down_proj``, and what hooks
find there. Where the engine refuses, the case says in which words.
"""

import contextlib
import copy
import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attach_cases import DENSE, Int8Linear, make, quietly, random_circuit, transformers
from cna_kernels import InputError
from tiny import SHAPE

ACT2FN = transformers.activations.ACT2FN
LlamaMLP = transformers.models.llama.modeling_llama.LlamaMLP
IDS = torch.randint(3, SHAPE["vocab_size"], (3, 7), generator=torch.Generator().manual_seed(1))
LEFT, RIGHT = torch.ones(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.long)
LEFT[1, :3], RIGHT[1, 4:] = 0, 0
ROWS = [0, -1, 0]  # of the three rows, the first and the last are steered


class Case(NamedTuple):
    """A condition: how the model is made, what is done to it before and after attach, how it is called.

    before, after: functions of the model. around: a function of the model that gives a context, entered for each call.
    call: a function of the model that gives logits or tokens; twin: the same for a twin that is called otherwise.
    refuses: words of the error at attach or in the pass.
    of_attach: words of the error of attach itself. tolerance: of the largest logit. sums: whether they are compared.
    """

    name: str
    before: Callable[[Any], Any] = lambda model: None
    after: Callable[[Any], Any] = lambda model: None
    around: Callable[[Any], Any] = lambda model: nullcontext()
    call: Callable[[Any], torch.Tensor] = lambda model: model(IDS).logits
    twin: Callable[[Any], torch.Tensor] | None = None
    model: str = "llama"
    make: dict[str, Any] = {}  # noqa: RUF012
    refuses: str | None = None
    of_attach: str | None = None
    tolerance: float = 1e-5
    mask: torch.Tensor | None = None
    sums: bool = True
    grad: bool = False


# What is done to models.


def layers(model):
    return getattr(model, "get_base_model", lambda: model)().get_decoder().layers


def mlps(model):
    return [layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp for layer in layers(model)]


def each(name, change):
    """Replace a part of every MLP by what ``change`` makes of it."""

    def apply(model):
        for mlp in mlps(model):
            setattr(mlp, name, change(getattr(mlp, name)))

    return apply


def to_each(change):
    return lambda model: [change(mlp) for mlp in mlps(model)] and None


def put(owner, name, value):
    """A context in which an attribute has another value."""

    @contextlib.contextmanager
    def context(model=None):
        old = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, old)

    return context


def clamped(self, x):
    return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-0.5, 0.5))


@functools.wraps(LlamaMLP.forward)
def wrapped(self, x):
    return clamped(self, x)


def past_the_module(self, x):
    return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


def twice(self, x):
    act = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(act) + self.down_proj(0.5 * act)


class SiLUActivation(nn.Module):
    """Called as transformers' own, and something else."""

    def forward(self, input):
        return F.silu(input).clamp(max=0.2)


class Softened(nn.SiLU):
    def forward(self, input):
        return 0.5 * F.silu(input)


class Rounded(nn.Linear):
    def forward(self, input):
        return super().forward(input.round(decimals=1))


def subclass(linear):
    linear.__class__ = Rounded
    return linear


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def halved(linear):
    parametrize.register_parametrization(linear, "weight", Halved())
    return linear


def of_subclass(model):
    kind = type("OwnMLP", (LlamaMLP,), {"forward": clamped})
    for mlp in mlps(model):
        mlp.__class__ = kind


def bound(function):
    return to_each(lambda mlp: setattr(mlp, "forward", function.__get__(mlp)))


def silu_as_a_function(model):
    for mlp in mlps(model):
        del mlp.act_fn
        mlp.act_fn = F.silu


def lora(model, targets=("down_proj", "up_proj")):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=[*targets], init_lora_weights=False)
    peft.get_peft_model(model, config).eval()


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device="cpu")


def swap(model):
    layers(model)[0], layers(model)[1] = layers(model)[1], layers(model)[0]


def set_weight(model):
    with torch.no_grad():
        for mlp in mlps(model):
            mlp.up_proj.weight.mul_(0.5)
            mlp.gate_proj.weight = nn.Parameter(0.5 * mlp.gate_proj.weight)
            mlp.down_proj.weight.data = 2 * mlp.down_proj.weight.data


def share_weights(model):
    for mlp in mlps(model)[1:]:
        mlp.down_proj.weight = mlps(model)[0].down_proj.weight


def with_mlp(make):
    return lambda model: setattr(layers(model)[1], "mlp", make(model))


def with_other_layer(model):
    layers(model)[2] = copy.deepcopy(layers(model)[2])


def compile_mlps(model):
    for layer in layers(model):
        layer.mlp = torch.compile(layer.mlp, backend="eager")


def new_list(model):
    model.model.layers = nn.ModuleList(list(model.model.layers))


def appended(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers += 1


def hook_with_keywords(model):
    for mlp in mlps(model):
        names = {"Phi3MLP": "hidden_states"}
        name = names.get(type(mlp).__name__, "x")
        mlp.register_forward_pre_hook(lambda _, a, k, name=name: ((), {name: a[0]}), with_kwargs=True)


# What is around a pass.


def hook_of_all(kind, function):
    """A context with a hook on all modules, which changes gate_proj and up_proj."""

    def hook(module, *rest):
        return function(*rest) if is_part(module) else None

    @contextlib.contextmanager
    def context(model):
        handle = getattr(hooks_of_all, f"register_module_{kind}_hook")(hook)
        try:
            yield
        finally:
            handle.remove()

    return context


def is_part(module):
    return isinstance(module, nn.Linear) and module.out_features == SHAPE["intermediate_size"]


def rounded(x):
    return x.round(decimals=1)


def rounded_forward(self, x):
    return F.linear(rounded(x), self.weight, self.bias)


def rounded_call(self, x):
    return nn.Module.__call__(self, rounded(x) if is_part(self) else x)


def halves(of_input, of_output):
    return None if of_input[0] is None else (0.5 * of_input[0],)


class RoundedFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return y.round(decimals=1) if function is F.linear else y


class RoundedProducts(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return y.round(decimals=1) if function is torch.ops.aten.mm.default else y


# How models are called.


def generated(**options):
    def call(model):
        mask = torch.ones_like(IDS)
        options_ = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        torch.manual_seed(0)
        out = model.generate(
            IDS, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **(options_ | options)
        )
        return torch.stack(out.logits, 1)[:, :1] if options.get("num_beams") else torch.stack(out.logits, 1)

    return call


def in_parts(model):
    cache = transformers.DynamicCache(config=model.config)
    return torch.cat([model(part, past_key_values=cache).logits for part in IDS.split([4, 2, 1], 1)], 1)


def in_static_cache(model):
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    return torch.cat([model(part, past_key_values=cache).logits for part in IDS.split([5, 2], 1)], 1)


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", **options)(IDS).logits


def compiled_then(change):
    """Compile, run, change the model, run again: what the second run gives."""

    def call(model):
        torch._dynamo.reset()
        run = torch.compile(model, backend="eager")
        run(IDS)
        with change(model) or nullcontext():
            return run(IDS).logits

    return call


def eager(model):
    return model(IDS).logits


def with_other_weights(model):
    weights = {name: 0.9 * x.detach() for name, x in model.named_parameters()}
    return torch.func.functional_call(model, weights, (IDS,), dict(use_cache=False)).logits


def over_models(model):
    """One pass through two sets of weights by torch.vmap."""
    weights = {name: torch.stack([x.detach(), 0.9 * x.detach()]) for name, x in model.named_parameters()}

    def one(weights):
        return torch.func.functional_call(model, weights, (IDS,), dict(use_cache=False)).logits

    return torch.vmap(one)(weights)[1]


def gradient(model):
    """d loss / d weights, by torch.func."""

    def loss(weight):
        name = "model.layers.0.mlp.up_proj.weight"
        return torch.func.functional_call(model, {name: weight}, (IDS,), dict(labels=IDS, use_cache=False)).loss

    return torch.func.grad(loss)(mlps(model)[0].up_proj.weight.detach())[None]


def backward(model):
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])[None]


def states(model):
    out = model(IDS, output_hidden_states=True)
    return torch.cat([out.logits.flatten(2), *out.hidden_states[1:]], 2)


def as_tuple(model):
    return model(IDS, return_dict=False)[0]


def under(context, call=lambda model: model(IDS).logits):
    def run(model):
        with context():
            return call(model).float()

    return run


def masked(mask):
    return lambda model: model(IDS, attention_mask=mask).logits * mask[:, :, None]


REPLACED = "was replaced after attach; detach, and attach again"
HYBRID = dict(num_hidden_layers=4)
BAMBA = HYBRID | dict(stem="Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8)
JAMBA = dict(stem="Jamba", num_experts=1, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1)
EXHAUSTIVE = ("compiled", "compiled, a forward of its own", "compiled, a hook on all modules")
RARE = ("compiled, a mode for functions",)  # takes 20 seconds
TWO = dict(num_hidden_layers=2)


CASES = [
    # Architectures, dtypes.
    *(Case(f"a {name}", model=name) for name in DENSE),
    Case("bf16", make=dict(dtype=torch.bfloat16), tolerance=0.05),
    Case("fp16", make=dict(dtype=torch.float16), tolerance=0.01),
    Case("fp64", make=dict(dtype=torch.float64), tolerance=1e-12),
    Case("a hybrid with linear attention", make=dict(stem="Qwen3_5", kind="Text", head_dim=8) | HYBRID),
    Case("a hybrid with Mamba", make=BAMBA),
    Case("a hybrid with its MLPs elsewhere", make=JAMBA),
    Case(
        "a hybrid with shared experts",
        make=dict(stem="Qwen3Next", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
        of_attach=r"has several MLPs \(mlp.experts, mlp.shared_expert\)",
    ),
    Case("a hybrid with other MLPs", make=dict(stem="Lfm2") | HYBRID, of_attach="has no MLP that is known"),
    Case("an MLP whose forward drops out", make=dict(stem="SeedOss", head_dim=8)),
    # Masks and calls.
    Case("padding on the left", call=masked(LEFT), mask=LEFT),
    Case("padding on the right", call=masked(RIGHT), mask=RIGHT),
    Case("eager attention", make=dict(attn_implementation="eager")),
    Case("hidden states are asked for", call=states),
    Case("a tuple is asked for", call=as_tuple),
    Case("embeddings are given", call=lambda model: model(inputs_embeds=model.get_input_embeddings()(IDS)).logits),
    Case("arguments by place", call=lambda model: model(IDS, torch.ones_like(IDS), torch.arange(7)[None]).logits),
    Case("MLPs called by keyword", hook_with_keywords),
    Case("MLPs called by keyword, Phi-3", hook_with_keywords, model="phi3"),
    # Caches and generate.
    Case("a prompt in parts", call=in_parts, sums=False),
    Case("a static cache", call=in_static_cache, sums=False),
    Case("generate", call=generated()),
    Case("generate, static cache", call=generated(cache_implementation="static", disable_compile=True)),
    Case("generate, no cache", call=generated(use_cache=False)),
    Case("generate, samples", call=generated(do_sample=True, top_k=5)),
    # Forwards of others.
    Case("the class is patched before attach", around=put(LlamaMLP, "forward", clamped)),
    Case("the class is patched by functools.wraps", around=put(LlamaMLP, "forward", wrapped)),
    Case("a forward of its own on every MLP", bound(clamped)),
    Case("a subclass with a forward of its own", of_subclass),
    Case("a forward past down_proj", bound(past_the_module), refuses="past_the_module, called down_proj 0 times"),
    Case("the forward calls down_proj twice", bound(twice), refuses="twice, called down_proj 2 times, expected once"),
    Case(
        "the forward of another MLP",
        lambda model: setattr(mlps(model)[0], "forward", mlps(model)[1].forward),
        refuses="called down_proj 0 times",
    ),
    Case("a forward is replaced after attach", after=bound(clamped), refuses=f"the forward of .* {REPLACED}"),
    Case("adapters under a forward of its own", lambda model: (bound(clamped)(model), lora(model))),
    Case("adapters after attach, under a forward of its own", bound(clamped), lora),
    # Activations.
    Case("another activation", each("act_fn", lambda _: nn.GELU())),
    Case("another activation after attach", after=each("act_fn", lambda _: nn.GELU())),
    Case("an activation called SiLUActivation", each("act_fn", lambda _: SiLUActivation())),
    Case("a subclass of SiLU", after=each("act_fn", lambda _: Softened())),
    Case("SiLU's forward is patched", around=put(type(ACT2FN["silu"]), "forward", Softened.forward)),
    Case("SiLU as a function", silu_as_a_function),
    # Linear layers.
    Case("int8 weights", each("down_proj", Int8Linear)),
    Case("int8 weights after attach", after=each("gate_proj", Int8Linear)),
    Case("a subclass of Linear", after=each("up_proj", subclass)),
    Case("a parametrised weight", each("up_proj", halved)),
    Case("other Linear layers after attach", after=each("gate_proj", copy.deepcopy)),
    Case("other weights after attach", after=set_weight),
    Case("layers share a weight", share_weights),
    Case("pruned weights", after=to_each(lambda mlp: prune.l1_unstructured(mlp.up_proj, "weight", 0.3))),
    Case("adapters", lora),
    Case("adapters after attach", after=lora),
    Case("offloaded", offloaded),
    Case("offloaded after attach", after=offloaded),
    # Layers and MLPs that are replaced.
    Case("an MLP is replaced", after=with_mlp(lambda model: copy.deepcopy(mlps(model)[1])), refuses=REPLACED),
    Case("an MLP of another layer", after=with_mlp(lambda model: mlps(model)[0]), refuses=REPLACED),
    Case("a compiled MLP in its place", after=compile_mlps, refuses=REPLACED),
    Case("layers change places", after=swap, refuses=rf"layers\[0\] {REPLACED}"),
    Case("a layer is replaced", after=with_other_layer, refuses=rf"layers\[2\] {REPLACED}"),
    Case("a layer more", after=appended, refuses="its layers were replaced after attach: 3 were there"),
    Case("a layer less", after=lambda model: layers(model).__delitem__(2), refuses="its layers were replaced"),
    Case("the same layers in a new list", after=new_list),
    Case("two layers share an MLP", with_mlp(lambda model: mlps(model)[0]), of_attach="share an MLP"),
    # Hooks, modes, patched functions.
    Case("a hook on gate_proj", after=to_each(lambda mlp: mlp.gate_proj.register_forward_hook(lambda *a: 2 * a[2]))),
    Case("a hook on the MLP", after=to_each(lambda mlp: mlp.register_forward_hook(lambda *a: 2 * a[2]))),
    Case("a hook on all modules", around=hook_of_all("forward", lambda x, y: y.clamp(-0.3, 0.3))),
    Case("a pre-hook on all modules", around=hook_of_all("forward_pre", lambda x: (rounded(x[0]),))),
    Case("a backward hook on all modules", around=hook_of_all("full_backward", halves), call=backward, grad=True),
    Case("nn.Linear.forward is patched", around=put(nn.Linear, "forward", rounded_forward)),
    Case("nn.Linear.__call__ is patched", around=put(nn.Linear, "__call__", rounded_call)),
    Case("F.linear is patched", around=put(F, "linear", lambda x, *more: torch._C._nn.linear(rounded(x), *more))),
    Case("F.silu is patched", around=put(F, "silu", lambda x, inplace=False: 0.5 * x)),
    Case("a mode for functions", around=lambda model: RoundedFunctions()),
    Case("a mode for operations", around=lambda model: RoundedProducts()),
    Case("a default device", around=lambda model: torch.device("cpu")),
    # Contexts and transforms.
    Case("inference mode", call=under(torch.inference_mode)),
    Case("autocast", call=under(lambda: torch.autocast("cpu", torch.bfloat16)), tolerance=0.05),
    Case("gradients", call=backward, grad=True),
    Case("gradients by torch.func", call=gradient, sums=False),
    Case("other weights by functional_call", call=with_other_weights, sums=False),
    Case("two sets of weights by vmap", call=over_models, sums=False),
    Case("training", after=lambda model: model.train()),
    # Compiled. Compiling takes seconds: the models are small, and where a plain twin says the same it is not compiled.
    Case("compiled", call=compiled, twin=eager, make=TWO),
    Case("compiled, its MLPs first", to_each(lambda mlp: mlp.compile(backend="eager"))),
    Case("compiled MLPs in their places", compile_mlps),
    Case("compiled, a forward of its own", bound(clamped), call=compiled, twin=eager, make=TWO),
    Case("compiled, a hook on all modules", call=compiled_then(hook_of_all("forward", lambda x, y: 0.5 * y)), make=TWO),
    Case("compiled, a mode for functions", call=compiled_then(lambda model: RoundedFunctions()), make=TWO),
    Case("compiled, a layer is replaced", call=compiled_then(with_other_layer), refuses=REPLACED),
]  # fmt: skip


def of_case(case):
    options = dict(case.make)
    stem, kind = options.pop("stem", None), options.pop("kind", "")
    if stem is None:
        return make(case.model, options.pop("dtype", torch.float32), **options)
    config = getattr(transformers, f"{stem}{kind}Config")(**(SHAPE | options))
    torch.manual_seed(3)
    return getattr(transformers, f"{stem}ForCausalLM")(config).eval()


def downs(model):
    found = []
    for mlp in mlps(model):
        mlp = getattr(mlp, "_orig_mod", mlp)
        found.append(mlp.down_proj)
    return found


@contextlib.contextmanager
def hooked(model, function):
    """A context with a hook on every down_proj: ``function`` of the layer and act gives another act, or None."""

    def hook(layer):
        def of_call(_, arguments):
            act = function(layer, arguments[0])
            return None if act is None else (act, *arguments[1:])

        return of_call

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled code does not look for new hooks
    handles = [down.register_forward_pre_hook(hook(layer)) for layer, down in enumerate(downs(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def scaled(circuit, multiplier):
    members, rows = circuit.by_layer(), torch.tensor(ROWS) == 0

    def function(layer, act):
        factor = torch.ones(len(rows), 1, act.shape[-1], dtype=act.dtype)
        factor[:, :, members.get(layer, ())] = multiplier
        factor[~rows] = 1
        if act.shape[0] != len(rows) and act.dim() == 3:
            factor = factor.repeat_interleave(act.shape[0] // len(rows), 0)
        return act * factor

    return function


def called(case, model, twin=False):
    call = (case.twin if twin else None) or case.call
    with torch.set_grad_enabled(case.grad), case.around(model):
        return call(model)


def close(got, expected, tolerance):
    scale = expected.abs().max() if expected.numel() else 0.0
    return got.shape == expected.shape and bool(((got - expected).abs() <= tolerance * scale).all())


def how_often(case):
    return pytest.mark.rare if case.name in RARE else pytest.mark.exhaustive if case.name in EXHAUSTIVE else ()


@pytest.mark.parametrize("case", [pytest.param(case, marks=how_often(case), id=case.name) for case in CASES])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_parity(case, backend):
    if backend and (case.of_attach or case.refuses or "compiled" in case.name or case.grad):
        pytest.skip("the same on every backend")
    model, twin = of_case(case), of_case(case)
    case.before(model), case.before(twin)
    with case.around(model):
        if case.of_attach:
            with pytest.raises(InputError, match=case.of_attach):
                quietly(model)
            return
        engine = quietly(model, backend=backend)
    case.after(model)
    if case.refuses:
        with pytest.raises(Exception, match=case.refuses):
            called(case, model)
        return
    case.after(twin)
    plain = called(case, twin, twin=True)
    assert close(called(case, model), plain, case.tolerance), "unsteered"
    circuit = random_circuit(engine, 0, size=12 * engine.n_layers)
    with hooked(twin, scaled(circuit, -2.0)):
        steered = called(case, twin, twin=True)
    with engine.steer(circuit, -2.0, ROWS):
        assert close(called(case, model), steered, case.tolerance), "steered"
    assert not steered.numel() or not close(plain, steered, 20 * case.tolerance), "steering must show"
    assert close(called(case, model), plain, case.tolerance), "as before"
    if case.sums and not case.grad:
        compare_sums(case, engine, model, twin)


def test_compiled_when_the_class_is_patched():
    """A compiled plain model goes on with the forward that it has compiled; an attached one sees the new one."""
    torch._dynamo.reset()
    model, twin = of_case(CASES[0]), of_case(CASES[0])
    engine, run = quietly(model), torch.compile(model, backend="eager")
    circuit = random_circuit(engine, 0, size=12 * engine.n_layers)
    with engine.steer(circuit, -2.0, ROWS), torch.no_grad():
        before = run(IDS).logits
        with put(LlamaMLP, "forward", clamped)(model), hooked(twin, scaled(circuit, -2.0)):
            expected = twin(IDS).logits
            assert close(run(IDS).logits, expected, 1e-5) and not close(before, expected, 1e-2)


def compare_sums(case, engine, model, twin):
    """The sums of last tokens, in a pass that is steered, against what hooks find in the twin's first pass."""
    found = {}
    last = torch.full((3,), 6) if case.mask is None else (case.mask * torch.arange(7)).argmax(1)

    def note(layer, act):
        if layer not in found:  # generate calls again for every token of the answer
            found[layer] = act[torch.arange(3), last]

    with hooked(twin, note):
        called(case, twin, twin=True)
    with engine.collect(torch.eye(3)) as sums:
        called(case, model)
    expected = torch.stack([found[layer] for layer in range(engine.n_layers)]).double()
    assert close(sums.total, expected, max(case.tolerance, 1e-5)), "sums"
    assert sums.count.tolist() == [1, 1, 1]
