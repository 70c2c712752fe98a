"""Text in, text out: steering at every position, many circuits in a batch, sampling, streaming, restoring."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from cna_kernels import Circuit, InputError, SteeringTable
from cna_kernels.errors import InputWarning
from cna_kernels.model import LanguageModel, load
from cna_kernels.model.cli import main
from cna_kernels.model.discovery.estimate import estimate
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.generate import Sampling, choose, generate
from cna_kernels.model.transformer import Steering
from tiny import TEXT_VOCABULARY, write_checkpoint, write_language_model, write_text_files

pytest.importorskip("transformers")

CIRCUIT = Circuit(((0, 3, 1.0), (1, 40, 1.0), (2, 7, 1.0), (2, 8, 1.0)), 3, 48)
OTHER = Circuit(((0, 5, 1.0), (2, 30, 1.0)), 3, 48)
PROMPTS = ["hi", "what is the time", "a", "one two three four five"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_language_model(tmp_path_factory.mktemp("llama")))


def ids_of(model, text):
    return torch.tensor([model.tokenizer.encode(text)])


def hooked(model, theirs, circuit, multiplier, ids, n_tokens):
    """Greedy tokens of transformers with hooks that multiply the circuit's neurons at every position."""

    def hook(layer):
        members = circuit.by_layer().get(layer, [])

        def multiply(_module, arguments):
            act = arguments[0].clone()
            act[..., members] *= multiplier
            return (act,)

        return multiply

    handles = [
        block.mlp.down_proj.register_forward_pre_hook(hook(layer)) for layer, block in enumerate(theirs.model.layers)
    ]
    with torch.no_grad():
        logits = theirs(ids, use_cache=False).logits
        tokens = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False, eos_token_id=None
        )[0, ids.shape[1] :].tolist()
    for handle in handles:
        handle.remove()
    return logits, tokens


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 3.0, -2.0])
def test_steering_equals_hooks_in_transformers(tmp_path, multiplier):
    theirs = write_checkpoint("llama", tmp_path, vocab_size=TEXT_VOCABULARY)
    write_text_files(tmp_path)
    model = load(tmp_path)
    ids = ids_of(model, "what is the time")
    logits, tokens = hooked(model, theirs, CIRCUIT, multiplier, ids, 24)
    plain = model(ids)
    with model.steered(CIRCUIT, multiplier):
        steered = model(ids)
        got = generate(
            model.transformer,
            [TokenPrompt(ids[0].tolist(), "p")],
            max_new_tokens=24,
            stop_ids=frozenset(),
            steer=model._steer(1),
        )
    assert (steered - logits).abs().max() <= 1e-4
    assert (plain - logits).abs().max() > 0.05, "steering must change something"
    assert got[0] == tokens


def test_multiplier_one_and_empty_circuit_are_bit_identical(model):
    ids = ids_of(model, "what is the time")
    plain = model(ids)
    for circuit, multiplier in ((CIRCUIT, 1.0), (Circuit((), 3, 48), 0.0)):
        with model.steered(circuit, multiplier):
            assert torch.equal(model(ids), plain)
    with model.steered(CIRCUIT, 0.0, row_circuit=[-1]):
        assert torch.equal(model(ids), plain)


def test_rows_of_a_batch_have_their_own_circuits(model):
    circuits = [None, CIRCUIT, OTHER, CIRCUIT]
    multipliers = [1.0, 0.0, -3.0, 4.0]
    together = model.generate(PROMPTS, circuit=circuits, multiplier=multipliers, max_new_tokens=12)
    alone = [
        model.generate(prompt, circuit=circuit, multiplier=multiplier, max_new_tokens=12)
        for prompt, circuit, multiplier in zip(PROMPTS, circuits, multipliers, strict=True)
    ]
    plain = model.generate(PROMPTS, max_new_tokens=12)
    assert together == alone
    assert together[0] == plain[0] and sum(a != b for a, b in zip(together, plain, strict=True)) >= 2


def test_batch_size_does_not_change_answers(model):
    circuits = [None, CIRCUIT, OTHER, CIRCUIT]
    answers = {
        tuple(model.generate(PROMPTS, circuit=circuits, multiplier=-2.0, batch=batch, max_new_tokens=12))
        for batch in (1, 3, 64)
    }
    assert len(answers) == 1


def test_rows_that_end_early_leave_the_others_their_circuits(model):
    """Rows are dropped from the batch once half of them have ended; each of the rest must keep its own circuit."""
    prompts = [TokenPrompt(ids, "p") for ids in model.tokenizer.encode_chat(PROMPTS * 2)]
    table = SteeringTable([CIRCUIT, OTHER], [-3.0, 6.0], 3, 48)
    numbers = [1, 0, -1, 1, 0, 0, 1, -1]

    def run(rows, stop):
        steer = Steering(table, table.row_circuit([numbers[row] for row in rows]))
        chosen = [prompts[row] for row in rows]
        return generate(model.transformer, chosen, max_new_tokens=20, stop_ids=stop, steer=steer)

    free = run(range(8), frozenset())
    stop = frozenset(free[0][2:4] + free[1][3:4] + free[3][4:5] + free[4][5:6])
    together = run(range(8), stop)
    assert len({len(answer) for answer in together}) >= 3, "rows must end at different times"
    assert together == [run([row], stop)[0] for row in range(8)]


def test_steered_restores_whatever_happens(model):
    ids = ids_of(model, "hi")
    plain = model(ids)
    with pytest.raises(RuntimeError, match="inside"), model.steered(CIRCUIT, -5.0):
        outer = model(ids)
        with model.steered(OTHER, 5.0):
            assert not torch.equal(model(ids), outer)
        assert torch.equal(model(ids), outer)
        raise RuntimeError("inside")
    assert torch.equal(model(ids), plain) and not torch.equal(outer, plain)
    with pytest.raises(InputError, match="n_layers: made for another model"), model.steered(Circuit((), 4, 48), 0.0):
        pass
    assert torch.equal(model(ids), plain)


def test_a_steered_model_may_get_another_circuit(model):
    """Of other layers, too: the table takes it, and the model is steered by it."""
    ids, layers = ids_of(model, "hi"), range(model.config.num_hidden_layers)
    circuits = [Circuit(tuple((layer, n, 1.0) for n in range(8)), len(layers), 48) for layer in layers]
    expected = []
    for circuit in circuits:
        with model.steered(circuit, -3.0):
            expected.append(model(ids))
    with model.steered(circuits[0], -3.0) as table:
        for circuit, logits in zip(circuits, expected, strict=True):
            table.replace(0, circuit, -3.0)
            assert torch.equal(model(ids), logits) and not torch.equal(logits, self_plain(model, ids))
        table.remove(0)
        assert torch.equal(model(ids), self_plain(model, ids))


def test_multipliers_change_between_calls(model):
    ids = ids_of(model, "hi")
    with model.steered([CIRCUIT, OTHER], [0.0, 1.0]) as table:
        ablated = model(ids)
        address = table.layer(0).value.data_ptr()
        table.set_multipliers([1.0, 1.0])
        assert torch.equal(model(ids), self_plain(model, ids)) and table.layer(0).value.data_ptr() == address
        table.set_multipliers([0.0, 1.0])
        assert torch.equal(model(ids), ablated)


def self_plain(model, ids):
    return model.transformer(ids)


def test_wrong_number_of_rows(model):
    with (
        model.steered(CIRCUIT, 0.0, row_circuit=[0, -1]),
        pytest.raises(InputError, match="row_circuit: expected 1, one for each"),
    ):
        model.generate("hi")
    with pytest.raises(InputError, match="circuit: expected one, or 2, one for each prompt, got 3"):
        model.generate(["a", "b"], circuit=[CIRCUIT] * 3)
    with pytest.raises(InputError, match="multiplier: expected one, or 2, one for each prompt, got 1"):
        model.generate(["a", "b"], circuit=CIRCUIT, multiplier=[0.0])


def test_stop_ids_end_an_answer(model):
    text = model.generate("hi", max_new_tokens=40)
    prompt = TokenPrompt(model.tokenizer.encode_chat(["hi"])[0], "p")
    ids = generate(model.transformer, [prompt], max_new_tokens=40, stop_ids=frozenset())[0]
    stop = ids[5]
    cut = generate(model.transformer, [prompt], max_new_tokens=40, stop_ids=frozenset([stop]))[0]
    assert cut == ids[: ids.index(stop)] and text == model.tokenizer.decode(
        ids[: min([ids.index(s) for s in (2, 5) if s in ids], default=40)]
    )


def test_streamed_pieces_join_to_the_answer(model):
    pieces = {}
    answers = model.generate(
        PROMPTS, max_new_tokens=30, on_text=lambda row, text: pieces.setdefault(row, []).append(text), batch=3
    )
    for row, answer in enumerate(answers):
        assert "".join(pieces.get(row, [])) == answer
    assert sum(map(len, pieces.values())) > 10


def test_sampling_is_seeded_by_row(model):
    options = dict(temperature=1.5, max_new_tokens=12)
    together = model.generate(PROMPTS, seed=7, **options)
    assert together == model.generate(PROMPTS, seed=7, batch=1, **options)
    assert together[2] == model.generate(PROMPTS[2], seed=9, **options)
    assert together != model.generate(PROMPTS, seed=8, **options)


def test_tiny_temperatures_are_greedy(model):
    greedy = model.generate(PROMPTS, max_new_tokens=8)
    assert model.generate(PROMPTS, max_new_tokens=8, temperature=1e-40) == greedy


def test_a_cache_beyond_memory_is_refused(tmp_path):
    model = load(write_language_model(tmp_path, max_position_embeddings=2**30))
    with pytest.raises(InputError, match=r"max_new_tokens: keys and values of 1 x \d+ tokens need \d"):
        model.generate("hi", max_new_tokens=10**9)


def test_sampled_frequencies():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()

    def frequencies(**options):
        sampling = Sampling(temperature=1.0, **options)
        generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
        drawn = choose(logits.expand(4000, 5), sampling, generators)
        return torch.bincount(drawn, minlength=5) / 4000

    for options, expected in (
        ({}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"top_p": 0.8}, [50 / 85, 20 / 85, 15 / 85, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"top_k": 4, "top_p": 0.72}, [50 / 70, 20 / 70, 0, 0, 0]),
    ):
        expected = torch.tensor(expected)
        got = frequencies(**options)
        assert (got - expected).abs().max() < 0.03 and (got[expected == 0] == 0).all(), options
    assert choose(torch.tensor([[1.0, 3.0, 3.0]]), Sampling(), []).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or above"),
        ({"temperature": float("nan")}, "temperature: expected 0 or above"),
        ({"top_p": 0.0}, "top_p: expected above 0"),
        ({"top_k": -1}, "top_k: expected 0 or above"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"seed": 2**64}, r"seed: expected -2\*\*63 to 2\*\*64 - 1"),
        ({"seed": [1, 2]}, "seed: expected one, or 1, one for each prompt, got 2"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"circuit": CIRCUIT, "multiplier": 3e38}, r"prompts\[0\]: the logits are not finite"),
        ({"circuit": CIRCUIT, "multiplier": float("inf")}, "multiplier: expected a finite number"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(InputError, match=message):
        model.generate("hi", **options)


def test_prompts_that_cannot_be_answered(model):
    with pytest.raises(InputError, match=r"prompts\[1\]: has \d+ tokens, the model's context is 64"):
        model.generate(["a", "b" * 80])
    with pytest.raises(InputError, match="prompts: holds no prompt"):
        model.generate([])
    with pytest.raises(InputError, match=r"prompts\[0\]: expected a prompt, got ''"):
        model.generate("")


def test_load_refusals(tmp_path):
    with pytest.raises(InputError, match=r"is neither a directory with a checkpoint nor a \.gguf file"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json: No such file"):
        load(tmp_path)
    with pytest.raises(InputError, match="dtype: expected auto or one of"):
        load(tmp_path, dtype="int8")
    for device in ("nonsense", "meta"):
        with pytest.raises(InputError, match=f"device: expected one of cpu, cuda, mps, xpu, got '{device}'"):
            load(tmp_path, device=device)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dtypes_by_name_and_of_torch(tmp_path, name):
    directory = write_language_model(tmp_path)
    by_name, of_torch = load(directory, dtype=name), LanguageModel(directory, dtype=getattr(torch, name))
    assert by_name.transformer.dtype == of_torch.transformer.dtype == getattr(torch, name)
    assert load(directory, dtype="auto").transformer.dtype == load(directory).transformer.dtype == torch.float32
    ids = ids_of(by_name, "hi")
    assert torch.equal(by_name(ids), of_torch(ids))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, "int8", "torch.bfloat16", float, 16, [], np.dtype("float32")]
)
def test_other_dtypes_are_refused(tmp_path, dtype):
    directory = write_language_model(tmp_path)
    for call in (load, LanguageModel, lambda path, **how: estimate(path, [("a", "p")], device="cpu", **how)):
        with pytest.raises(InputError, match=r"^dtype: expected auto or one of bfloat16, float16, float32, by name or"):
            call(directory, dtype=dtype)


def test_the_command_takes_the_checkpoints_own_dtype(tmp_path, capsys):
    directory = write_language_model(tmp_path)
    words = ["run", str(directory), "-p", "what is the time", "--max-new-tokens", "6", "--json", "--dtype"]
    found = {}
    for dtype in ("auto", "float32"):
        found[dtype] = main([*words, dtype]), capsys.readouterr()
    assert found["auto"][0] == 0 and found["auto"][1].out == found["float32"][1].out
    with pytest.raises(SystemExit, match="2"):
        main([*words, "float64"])
    assert re.search(r"--dtype: invalid choice: 'float64' \(choose from '?auto", capsys.readouterr().err)


def test_a_circuit_of_another_checkpoint(model, tmp_path):
    other = load(write_language_model(tmp_path, seed=1))
    circuit = model.discover(["a", "b"], ["c"], top_k=3)
    model.check_circuit(circuit, "c.json")
    with pytest.raises(InputError, match=r"c\.json: model\.\w+_sha256: made for another model: found in .*, this is"):
        other.check_circuit(circuit, "c.json")
    other.check_circuit(circuit, "c.json", any_model=True)
    retold = replace(circuit, chat_template_sha256="x")
    with pytest.warns(InputWarning, match=r"c\.json: chat_template_sha256: found with another chat template \(x\)"):
        model.check_circuit(retold, "c.json")
    with pytest.warns(InputWarning, match=r"c\.json: chat_template_sha256: .*, here prompts are plain text"):
        model.check_circuit(circuit, "c.json", chat=False)
    plain = model.discover(["a", "b"], ["c"], top_k=3, chat=False)
    model.check_circuit(plain, "c.json", chat=False)
    for language_model, any_model in ((model, False), (other, True)):
        with pytest.warns(InputWarning, match=r"c\.json: chat_template_sha256: found on plain text.*; --no-template"):
            language_model.check_circuit(plain, "c.json", any_model=any_model)
    other.check_circuit(CIRCUIT, "c.json")  # no provenance: only the shape is checked
    with pytest.raises(InputError, match=r"c\.json: n_neurons: made for another model: expected 48, got 50"):
        other.check_circuit(Circuit((), 3, 50), "c.json", any_model=True)


def test_loading_and_calling_leave_the_process_as_it_was(tmp_path):
    import os
    import signal

    def state():
        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
            {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)},
            dict(os.environ),
        )

    write_language_model(tmp_path)
    before = state()
    model = load(tmp_path)
    model.generate("hi", temperature=1.0, max_new_tokens=3)
    model.discover(["a"], ["b"], top_k=3)
    assert state() == before
