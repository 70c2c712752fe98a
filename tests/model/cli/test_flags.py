"""Options that several commands take: given twice, out of range, and what a repeated -c means to each command."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

from cna_kernels import Circuit
from cna_kernels.model import load
from cna_kernels.model.checkpoint import export as export_module
from cna_kernels.model.cli import flags, main
from cna_kernels.model.cli.parser import build_parser
from tiny import write_language_model

pytest.importorskip("transformers")


def commands():
    """The parser of every command."""
    (sub,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {name: parser for name, parser in sub.choices.items() if name != "lm-eval"}


def value_of(action):
    """A word that the option takes."""
    if action.choices:
        return next(iter(action.choices))
    for word in ("1", "x", "a=1"):
        try:
            (action.type or str)(word)
            return word
        except (argparse.ArgumentTypeError, ValueError):
            pass
    raise AssertionError(action)


OPTIONS = [
    (name, action.option_strings[-1], value_of(action))
    for name, parser in commands().items()
    for action in parser._actions
    if action.option_strings and action.nargs is None
]
SEVERAL = {
    ("run", "--circuit"),
    ("run", "--prompt"),
    ("export", "--circuit"),
    ("eval", "--circuit"),
    ("eval", "--control"),
    ("sweep", "--circuit"),
    ("matrix", "--circuit"),
    ("matrix", "--behaviour"),
} | {(name, option) for name, option, _ in OPTIONS if option in ("--template-arg", "--model-arg")}


def words_of(name, option, *values):
    """The words of a command with an option given for each value, and what else the command needs."""
    parser, words = commands()[name], [name]
    for action in parser._actions:
        if not action.option_strings:
            words += ["x"] * (action.nargs if isinstance(action.nargs, int) else 1)
        elif action.required and option not in action.option_strings:
            words += [action.option_strings[0], value_of(action)]
    return [*words, *(word for value in values for word in (option, value))]


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_an_option_given_twice(name, option, value, capsys):
    """The last of two values is never taken without a word: the option takes several, or is refused."""
    words = words_of(name, option, value, value)
    if (name, option) in SEVERAL:
        args = build_parser().parse_args(words)
        assert any(isinstance(given, list) and len(given) == 2 for given in vars(args).values())
        return
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and f"{option}: given twice" in error


def test_all_options_are_known():
    assert len(OPTIONS) > 80 and {(name, option) for name, option, _ in OPTIONS} >= SEVERAL


def numeric():
    """The options that take numbers."""
    for name, option, value in OPTIONS:
        action = next(a for a in commands()[name]._actions if option in a.option_strings)
        try:
            (action.type or str)("x=y")
        except (argparse.ArgumentTypeError, ValueError):
            if value == "1":
                yield name, option


HUGE = ["1" + "0" * 30, "9" * 5000, "1e30", "-1" + "0" * 30, "nan", "inf", "", "x"]


@pytest.mark.parametrize(("name", "option"), list(numeric()))
def test_numbers_are_bounded(name, option, capsys):
    """No number is too large, and no word too odd, for a line that names the option."""
    for word in HUGE:
        try:
            args = build_parser().parse_args([*words_of(name, option), f"{option}={word}"])
        except SystemExit as error:
            said = capsys.readouterr().err
            assert error.code == 2 and said.count("\n") == 1 and option in said and len(said) < 700
        else:
            assert option == "--fraction", f"{word} is taken"  # whose bounds the settings check
            assert not 0 <= args.fraction <= 1


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (flags.whole(1, 5), ["1", "5", "05"], ["0", "6", "-1", "+1", "1.0", "", "\u0663", "1_0", " 1"]),
        (flags.whole(-3, 3), ["-3", "3"], ["-4", "--3", "-"]),
        (flags.number(0, 1), ["0", "1", "1e-9", "-0"], ["-1e-9", "1.1", "nan", "inf", "", "x"]),
        (flags.batch, ["auto", "3"], ["0", "all"]),
        (flags.threads, ["1", str(flags.MOST_THREADS)], ["0", str(flags.MOST_THREADS + 1)]),
    ],
)
def test_types(read, good, bad):
    for word in good:
        read(word)
    for word in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="expected a"):
            read(word)


# What a repeated -c means.

A = Circuit(tuple((layer, index, 1.0) for layer in range(3) for index in range(0, 24, 2)), 3, 48)
B = Circuit(tuple((layer, index, 1.0) for layer in range(3) for index in range(21, 48, 2)), 3, 48)
OVERLAPPING = Circuit(((1, 4, 1.0), (2, 47, 1.0)), 3, 48)
BOTH = Circuit((*A.neurons, *B.neurons), 3, 48)


# Two circuits of which some neurons are mirrored with --sign aligned: (1, 4) in both, (2, 2) in one of them.
C = Circuit(((1, 4, 1.0), (2, 2, -1.0), (0, 9, 2.0)), 3, 48, positive_mean=(-1.0, 1.0, 1.0))
D = Circuit(((1, 4, 2.0), (0, 40, 1.0), (2, 30, -3.0)), 3, 48, positive_mean=(-2.0, 3.0, 1.0))
E = Circuit(((2, 2, 1.0),), 3, 48, positive_mean=(1.0,))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    write_language_model(directory / "model")
    for name, circuit in (("a", A), ("b", B), ("c", OVERLAPPING), ("C", C), ("D", D), ("E", E)):
        circuit.save(directory / f"{name}.json")
    (directory / "p.txt").write_text("open it\n")
    return directory


def with_circuits(files, command, *names, more=()):
    words = [command, str(files / "model"), *(w for name in names for w in ("-c", str(files / f"{name}.json")))]
    return [*words, "--any-model", *more]


@pytest.mark.parametrize("m", ["0", "4", "1"])
def test_several_circuits_of_run_steer_together(files, tmp_path, capsys, m):
    """As export writes them: the answers are those of a checkpoint with both circuits' columns scaled."""
    run = with_circuits(files, "run", "a", "b", more=["-m", m, "-p", "hi", "--max-new-tokens", "6", "--json"])
    assert main(run) == 0
    _, steered = (answer["text"] for answer in json.loads(capsys.readouterr().out)[0]["answers"])
    model = load(files / "model")
    assert steered == model.generate("hi", circuit=BOTH, multiplier=float(m), max_new_tokens=6)
    if m != "1":
        out = str(tmp_path / "steered")
        assert main(with_circuits(files, "export", "a", "b", more=["-m", m, "--to", "checkpoint", "-o", out])) == 0
        assert steered == load(out).generate("hi", max_new_tokens=6)
        assert steered != model.generate("hi", circuit=B, multiplier=float(m), max_new_tokens=6), "the last one alone"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "a", "b", ["-m", "0,2", "-p", "hi"]), "--multiplier: expected one number for all 2 circuits, got 0,2"),
        (("run", "a", "c", ["-m", "0.5", "-p", "hi"]), "c.json: neuron 4 of layer 1 is in another circuit, too"),
        (("run", "a", ["-m", "2", "-p", "hi", "--sign", "aligned"]), "a.json: positive_mean: is missing"),
        (("export", "C", ["--to", "ref-code", "-o", "OUT", "--sign", "aligned"]), "circuit: is aligned: the public"),
        (("run", "C", "D", ["-m", "0", "-p", "hi", "--sign", "aligned"]), "D.json: neuron 4 of layer 1 is in another"),
        (("run", "C", "E", ["-m", "0", "-p", "hi", "--sign", "aligned"]), "neuron 2 of layer 2 is in another circuit"),
        (("eval", "a", "b", ["--harmful", "p.txt", "-o", "OUT"]), "--circuit: cna eval takes one circuit"),
        (("sweep", "a", "b", ["--harmful", "p.txt"]), "--circuit: cna sweep takes one circuit"),
        (
            ("export", "a", "b", ["--to", "ref-code", "-o", "OUT"]),
            "--circuit: the public code's JSON holds one circuit",
        ),
        (("export", "a", "b", ["-m", "0,1,2", "--to", "lora", "-o", "OUT"]), "multiplier: expected 2, one for each"),
        (
            ("run", "a", ["-m", ",".join(["0"] * 257), "-p", "hi"]),
            "--multiplier: expected at most 256 numbers, got 257",
        ),
        (("run", "a", ["-m", "1e7", "-p", "hi"]), "--multiplier: expected numbers from -1e+06 to 1e+06, got 1e+07"),
        (
            ("run", "a", ["--template-arg", "x=1", "--template-arg", "x=2", "-p", "hi"]),
            "--template-arg: gives a variable",
        ),
        (("sweep", "a", ["--m", "0,-1e30", "--harmful", "p.txt"]), "--m: expected numbers from -1e+06 to 1e+06"),
    ],
    ids=str,
)
def test_what_a_command_cannot_do_with_circuits(files, tmp_path, capsys, words, message):
    *names, more = words[1:]
    more = [word.replace("OUT", str(tmp_path / "out")).replace("p.txt", str(files / "p.txt")) for word in more]
    assert main(with_circuits(files, words[0], *names, more=more)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("names", "m"), [(("C",), "-30"), (("D",), "12"), (("C", "D"), "2")])
def test_aligned_circuits_on_the_command_line(files, tmp_path, capsys, names, m):
    """`run` and `export` with --sign aligned scale each neuron by m or 2 - m; others are not the same answers."""
    own = {"C": C, "D": D}
    of_each = [dict(zip(own[name].pairs, own[name].aligned().multipliers(float(m)), strict=True)) for name in names]
    shared = {pair: factor for found in of_each for pair, factor in found.items()}  # (1, 4) at 0 in both
    assert set(shared.values()) == {float(m), 2 - float(m)}
    model = load(files / "model")
    expected = {}
    for (layer, index), factor in shared.items():
        expected.setdefault(layer, {})[index] = factor
    export_module.to_checkpoint(files / "model", model.checkpoint, expected, tmp_path / "expected")
    wanted = load(tmp_path / "expected")
    more = ["-m", m, "--sign", "aligned", "-p", "hi", "--max-new-tokens", "6", "--json"]
    assert main(with_circuits(files, "run", *names, more=more)) == 0
    _, steered = (answer["text"] for answer in json.loads(capsys.readouterr().out)[0]["answers"])
    assert steered == wanted.generate("hi", max_new_tokens=6)
    out = tmp_path / "steered"
    more = ["-m", m, "--to", "checkpoint", "-o", str(out), "--sign", "aligned"]
    assert main(with_circuits(files, "export", *names, more=more)) == 0
    exported, plain = load(out), load(files / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert torch.equal(exported(ids), wanted(ids)) and (exported(ids) - plain(ids)).abs().max() > 1e-3
        if len(names) == 1:
            with model.steered(own[names[0]].aligned(), float(m)):
                assert (model(ids) - exported(ids)).abs().max() < 1e-3
            with model.steered(own[names[0]], float(m)):
                assert (model(ids) - exported(ids)).abs().max() > 1e-3, "the plain circuit does something else"


def test_overlapping_circuits_that_are_ablated(files, capsys):
    run = with_circuits(files, "run", "a", "c", more=["-p", "hi", "--max-new-tokens", "3", "--json"])
    assert main(run) == 0 and len(json.loads(capsys.readouterr().out)[0]["answers"]) == 2


@pytest.mark.parametrize("to", ["lora", "checkpoint"])
@pytest.mark.parametrize("m", [1e6, 1e38, -1e38])
def test_no_infinity_is_exported(files, tmp_path, to, m):
    """Through the functions, which take larger multipliers than the command: refused, naming the tensor; or finite."""
    from cna_kernels import InputError
    from cna_kernels.model.checkpoint import export, lora

    model = load(files / "model", stream_layers=True)
    out = tmp_path / "out"
    multipliers = export.neuron_multipliers([A], [m])
    try:
        if to == "lora":
            lora.to_lora(model.checkpoint, model.config, multipliers, out, dtype="float16")
        else:
            export.to_checkpoint(files / "model", model.checkpoint, multipliers, out)
    except InputError as error:
        assert "down_proj" in str(error) and "would hold infinities or NaN in float" in str(error)
        assert not out.exists() and [*tmp_path.iterdir()] == []
    else:
        assert to == "checkpoint"
        for path in out.glob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())
