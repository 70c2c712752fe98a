"""What requests may ask for, what they carry, and the salt of the prefix cache."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from cna_kernels import Circuit, InputError
from cna_kernels.vllm import plugin
from cna_kernels.vllm.options import Options, read
from cna_kernels.vllm.requests import FrontEnd, front_end_of, own_keys, resolve, salt_of_others

L, N = 3, 300
FIRST = Circuit(((2, 7, 1.0), (0, 3, -1.0), (2, 1, -1.0)), L, N)
SECOND = Circuit(((2, 7, 1.0), (1, 200, 2.0)), L, N)
MIRRORED = Circuit(((0, 5, -1.0), (1, 6, 1.0)), L, N, positive_mean=(1.0, 1.0)).aligned()
CONFIG = SimpleNamespace(model="m", hf_text_config=SimpleNamespace(num_hidden_layers=L, intermediate_size=N))


@pytest.fixture
def front(tmp_path):
    files = {"first": FIRST, "second": SECOND, "mirrored": MIRRORED}
    for name, circuit in files.items():
        circuit.save(tmp_path / f"{name}.json")
    circuits = {name: str(tmp_path / f"{name}.json") for name in files}
    return FrontEnd(Options(circuits, columns=2, max_neurons=4), CONFIG)


# extra_args -> {(layer, index): multiplier}
MEANS = [
    ({"cna_circuit": "first"}, {(0, 3): 0, (2, 1): 0, (2, 7): 0}),
    ({"cna_circuit": "first", "cna_multiplier": 2}, {(0, 3): 2, (2, 1): 2, (2, 7): 2}),
    (
        {"cna_circuit": ["first", "second"], "cna_multiplier": [2, 3.5]},
        {(0, 3): 2, (2, 1): 2, (2, 7): 7, (1, 200): 3.5},
    ),
    ({"cna_circuit": ["first", "second"], "cna_multiplier": [2, 0.5]}, {(0, 3): 2, (2, 1): 2, (1, 200): 0.5}),
    ({"cna_circuit": ["second", "second"], "cna_multiplier": -3.0}, {(2, 7): 9, (1, 200): 9}),
    ({"cna_circuit": "mirrored", "cna_multiplier": 1.5}, {(0, 5): 0.5, (1, 6): 1.5}),
    ({"cna_circuit": "first", "cna_multiplier": 1}, {}),
    ({"cna_column": 1}, {}),
]


@pytest.mark.parametrize(("extra", "expected"), MEANS)
def test_what_a_request_means(front, extra, expected):
    asked = front.resolve({"other": 1, **extra})
    assert asked.column == extra.get("cna_column") and asked.phase == "both"
    if not expected:
        assert asked.setting is None and asked.salted(None, 3) is None
        assert asked.salted("s", 3) == salt_of_others("s") != salt_of_others("t")
        return
    setting = asked.setting
    got = dict(
        zip(zip(setting.layer.tolist(), setting.index.tolist(), strict=True), setting.value.tolist(), strict=True)
    )
    assert got == expected and list(got) == sorted(got)
    report = asked.report()
    assert report["n_neurons"] == len(expected) and report["sha256"] == setting.digest
    names = extra["cna_circuit"] if isinstance(extra["cna_circuit"], list) else [extra["cna_circuit"]]
    assert [each["circuit"] for each in report["circuits"]] == names
    json.dumps(report)


REFUSED = {
    "cna_circuit: no circuit 'third'; known are first, mirrored, second": {"cna_circuit": "third"},
    "cna_circut: is unknown; known are cna_circuit, cna_multiplier, cna_phase, cna_column": {"cna_circut": "first"},
    "CNA_circuit: is unknown": {"CNA_circuit": "first"},
    "cna: is unknown": {"cna": {"setting": None, "column": 0}},
    "cna_multiplier: expected together with cna_circuit": {"cna_multiplier": 0.0},
    "cna_multiplier: expected a finite number, got nan": {"cna_circuit": "first", "cna_multiplier": float("nan")},
    "cna_multiplier: expected a finite number, got -inf": {"cna_circuit": "first", "cna_multiplier": -float("inf")},
    "cna_multiplier: expected a finite number, got 1e+39": {"cna_circuit": "first", "cna_multiplier": 1e39},
    "cna_multiplier: expected a finite number, got '0'": {"cna_circuit": "first", "cna_multiplier": "0"},
    "cna_multiplier: expected a finite number, got True": {"cna_circuit": "first", "cna_multiplier": True},
    "cna_multiplier: expected a finite number, got None": {"cna_circuit": "first", "cna_multiplier": None},
    "cna_multiplier: expected one number, or 1, got 2": {"cna_circuit": "first", "cna_multiplier": [0, 1]},
    "cna_multiplier: expected one number, or 2, got 0": {"cna_circuit": ["first", "second"], "cna_multiplier": []},
    "cna_circuit: expected 1 to 64 names, got 0": {"cna_circuit": []},
    "cna_circuit: expected letters": {"cna_circuit": "../first"},
    "cna_circuit: expected letters, digits, '.', '_' and '-', got 3": {"cna_circuit": 3},
    "cna_circuit: 6 neurons together, the engine takes 4; see max_neurons": {
        "cna_circuit": ["first", "second", "mirrored"]
    },
    "cna_phase: expected together with cna_circuit": {"cna_phase": "answer"},
    "cna_phase: expected one of both, prompt, answer, got 'answers'": {"cna_circuit": "first", "cna_phase": "answers"},
    "cna_phase: expected one of both, prompt, answer, got None": {"cna_circuit": "first", "cna_phase": None},
    "cna_phase: expected one of both, prompt, answer, got ['answer']": {
        "cna_circuit": "first", "cna_phase": ["answer"],
    },
    "cna_column: expected 0 to 1, got 2": {"cna_column": 2},
    "cna_column: expected 0 to 1, got True": {"cna_column": True},
    "cna_column: expected 0 to 1, got '0'": {"cna_column": "0"},
    "multiplier: expected a finite number": {"cna_circuit": ["first"] * 3, "cna_multiplier": 1e20},
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_refusals_name_the_argument(front, said):
    with pytest.raises(InputError) as caught:
        front.resolve(REFUSED[said])
    assert said in str(caught.value)
    assert front.resolve({"cna_circuit": "first"}).setting is not None, "the front end goes on"


def test_requests_without_our_keys_ask_for_nothing(front):
    assert front.resolve(None) is front.resolve({}) is front.resolve({"top": 1}) is None
    assert own_keys({"cna_circuit": 0, "x": 1, "CNA": 2, 3: 4}) == {"cna_circuit", "CNA"}


def test_the_salt_is_of_the_content(front):
    """Not of the name, and never that of another multiplier or circuit: a name may mean another circuit any time."""

    def salt(old=None, n_prompt=5, **extra):
        return front.resolve({f"cna_{name}": value for name, value in extra.items()}).salted(old, n_prompt)

    salts = [
        salt(circuit="first"), salt(circuit="first", multiplier=2.0), salt(circuit="second"),
        salt("s", circuit="first"), salt(circuit=["first", "second"]), salt("None", circuit="first"), None, "s",
        salt(circuit="first", phase="prompt"), salt(circuit="first", phase="answer"),
        salt(circuit="first", phase="prompt", n_prompt=6), salt(circuit="first", phase="answer", n_prompt=6),
    ]  # fmt: skip
    salts += [salt_of_others(each) for each in ("s", *salts[:3])]  # a client may know the salts of others
    assert len(set(salts)) == len(salts)
    assert salt(circuit="first") == salts[0] == salt(circuit="first", multiplier=0) == salt(circuit=["first"])
    assert salt(circuit="first", n_prompt=9, phase="both") == salts[0], "where every token is steered, alike"
    front.registry.put("other", FIRST)
    assert salt(circuit="other") == salts[0], "another name"
    front.registry.put("first", SECOND)
    assert salt(circuit="first") == salts[2] != salts[0], "the name means another circuit now"


@pytest.fixture
def process(front, monkeypatch):
    """What becomes of a request in the front end, without vLLM: its salt, what it carries, or the refusal."""

    class Refused(ValueError):
        pass

    errors = ModuleType("vllm.exceptions")
    errors.VLLMValidationError = Refused
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", errors)

    def process(extra, salt=None, ids=(5, 6, 7), n=1, embeds=None, processor=None, resumable=False):
        params = SimpleNamespace(extra_args=extra, n=n)
        request = SimpleNamespace(
            cache_salt=salt, prompt_token_ids=ids, prompt_embeds=embeds, resumable=resumable, sampling_params=params
        )
        processor = processor or SimpleNamespace(_cna=front)
        return plugin._process_inputs(lambda *_: request, processor, "id", "prompt", params)

    process.Refused = Refused
    return process


def test_a_request_on_its_way_in(front, process):
    """The salt goes by setting, phase and length of the prompt; a client's own salt is never one of these."""
    answer = {"cna_circuit": "first", "cna_phase": "answer"}
    request, asked = process(answer), front.resolve(answer)
    assert request.cache_salt == asked.salted(None, 3) != process(answer, ids=(5, 6)).cache_salt
    assert process(answer, ids=None, embeds=np.zeros((3, 8))).cache_salt == request.cache_salt
    assert request.sampling_params.extra_args == {**answer, "cna": asked.record()}
    assert request.sampling_params.extra_args["cna"]["phase"] == "answer"
    assert process(None).cache_salt is None and process(None).sampling_params.extra_args is None
    assert process({"top": 1}, salt=request.cache_salt).cache_salt == salt_of_others(request.cache_salt)
    without = SimpleNamespace(_cna=None)
    assert process(None, salt="s", processor=without).cache_salt == "s", "without the options vLLM is left alone"


@pytest.mark.parametrize(
    ("said", "extra", "more"),
    [
        ("cna_column: 2 answers (n) would count the prompt as often", {"cna_column": 0}, {"n": 2}),
        ("a streaming session keeps the salt", {"cna_circuit": "first"}, {"resumable": True}),
        ("cna_circuit: no circuit 'third'", {"cna_circuit": "third"}, {}),
    ],
)
def test_requests_that_are_refused_on_their_way_in(process, said, extra, more):
    with pytest.raises(process.Refused) as caught:
        process(extra, **more)
    assert said in str(caught.value)


def test_several_answers_may_be_steered(front, process):
    request = process({"cna_circuit": "first"}, n=2)
    assert request.cache_salt == front.resolve({"cna_circuit": "first"}).salted(None, 3)


def test_an_engine_without_the_options_says_so():
    processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    assert front_end_of(processor) is None and resolve(processor, {"x": 1}) is None
    with pytest.raises(InputError, match="cna_circuit: this engine takes no circuits: start the engine with"):
        resolve(processor, {"cna_circuit": "first"})
    summing = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"cna": {}}, model_config=CONFIG))
    with pytest.raises(InputError, match="cna_column: this engine sums nothing"):
        resolve(summing, {"cna_column": 0})


def test_settings_do_not_depend_on_the_order_of_neurons(front):
    front.registry.put("turned", Circuit(FIRST.neurons[::-1], L, N))
    turned, first = (front.resolve({"cna_circuit": name}).setting for name in ("turned", "first"))
    assert turned.digest == first.digest
    assert first.layer.dtype == np.int32 and first.value.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "expected an object"),
        ({"circuit": {}}, "circuit: is unknown; known are circuits"),
        ({"circuits": 3}, "circuits: expected a directory, or files by name"),
        ({"circuits": {"a": 1}}, "circuits: expected a directory, or files by name"),
        ({"columns": True}, "columns: expected a whole number from 0 on"),
        ({"columns": -1}, "columns: expected a whole number from 0 on"),
        ({"max_neurons": 0}, "max_neurons: expected a whole number from 1 on"),
        ({"any_model": 1}, "any_model: expected true or false"),
    ],
)
def test_options_are_checked(given, said):
    with pytest.raises(InputError) as caught:
        read(given)
    assert said in str(caught.value)
    assert read({}) == Options({})
