"""Prompts to ids: chats, system messages, template variables, lengths, special tokens in prompts, token ids."""

import datetime
import json
import math
from types import SimpleNamespace

import pytest

from cna_kernels import Circuit, InputError
from cna_kernels.model import load
from cna_kernels.model.cli import main
from cna_kernels.model.prompts.files import ChatText, PromptSet
from cna_kernels.model.text import chat_template
from cna_kernels.model.text.prompt_encoder import PromptEncoder
from cna_kernels.model.text.tokenizer import Tokenizer
from tiny import TEMPLATE, TEXT_VOCABULARY, set_field, write_language_model

THINKS = "{% if enable_thinking is defined and not enable_thinking %}no {% endif %}" + TEMPLATE
DATED = "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE


@pytest.fixture
def checkpoint(tmp_path):
    return write_language_model(tmp_path / "model")


def encoder_of(directory, **options):
    return PromptEncoder(Tokenizer(directory, TEXT_VOCABULARY), options.pop("context_length", 64), **options)


def text_of(encoder, prompt, **options):
    (found,) = encoder.encode(PromptSet((prompt,), ("p",)), **options)
    return encoder.tokenizer._backend.decode(found.ids, skip_special_tokens=False)


def test_system_messages_and_chats(checkpoint):
    encoder = encoder_of(checkpoint, system="S")
    assert text_of(encoder, "hi") == "<s><user>S<end><user>hi<end><assistant>"
    own = ChatText([{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}])
    assert text_of(encoder, own) == "<s><user>own<end><user>hi<end><assistant>"
    assert text_of(encoder, ChatText([{"role": "user", "content": "hi"}])).startswith("<s><user>S<end>")
    assert text_of(encoder, "hi", chat=False) == "<s>hi"
    with pytest.raises(InputError, match="p: is a chat, which needs a chat template"):
        encoder.encode(PromptSet((own,), ("p",)), chat=False)


def test_prompts_that_are_too_long(checkpoint):
    encoder = encoder_of(checkpoint, context_length=20)
    with pytest.raises(InputError, match="p: has 24 tokens, the model's context is 20"):
        encoder.encode(PromptSet(("x" * 20,), ("p",)))
    (kept,) = encoder.encode(PromptSet(("x" * 20,), ("p",)), keep_long=True)
    assert len(kept.ids) == 21  # enough to be seen as too long


def test_a_long_text_ends_the_work_before_the_next_is_rendered(checkpoint, monkeypatch):
    set_field(checkpoint, chat_template="{{ 'how to ' * 500000 }}")
    encoder = encoder_of(checkpoint)
    encoded = []
    monkeypatch.setattr(encoder.tokenizer, "encode_rendered", lambda text, **_: encoded.append(text) or [3] * 99)
    with pytest.raises(InputError, match="p0: has 99 tokens"):
        encoder.encode(PromptSet(("x",) * 100, tuple(f"p{n}" for n in range(100))))
    assert len(encoded) == 1


def test_special_tokens_in_prompts_are_counted_and_said_once(checkpoint):
    encoder = encoder_of(checkpoint)
    with pytest.warns(UserWarning, match="p1: holds special tokens, which count as such") as said:
        encoder.encode(PromptSet(("a", "<user>b", "c<end>"), ("p0", "p1", "p2")))
    assert len(said) == 1 and (encoder.n_marked, encoder.first_marked) == (2, "p1")


@pytest.mark.parametrize("names", [{"messages": 1}, {"a b": 1}])
def test_names_that_are_no_variables(checkpoint, names):
    with pytest.raises(InputError, match="template_args: expected names of template variables"):
        load(checkpoint, template_args=names)


@pytest.mark.parametrize("value", [math.nan, [math.inf], "\ud800", {1, 2}, {"a": object()}])
def test_values_that_no_record_can_hold(checkpoint, value):
    with pytest.raises(InputError, match="template_args: x: "):
        load(checkpoint, template_args={"x": value})
    if isinstance(value, str):
        with pytest.raises(InputError, match="system: holds half of a surrogate pair"):
            load(checkpoint, system=value)


def discover(directory, tmp_path, *more):
    for side, word in (("positive", "open"), ("negative", "close")):
        (tmp_path / f"{side}.txt").write_text("".join(f"{word} {n}\n" for n in range(12)))
    sides = [w for s in ("positive", "negative") for w in (f"--{s}", str(tmp_path / f"{s}.txt"))]
    words = ["discover", str(directory), *sides, "-o", str(tmp_path / "c.json"), "--no-universal", "--top-k", "4"]
    return main([*words, *map(str, more)])


def test_the_command_line_says_and_records_what_it_used(checkpoint, tmp_path, capsys):
    set_field(checkpoint, chat_template=THINKS)
    given = ["--template-arg", "enable_thinking=false", "--template-arg", "x=y", "--system", "Be kind"]
    assert discover(checkpoint, tmp_path, *given) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "chat template" in line)
    assert line.startswith("cna discover: model 'model' ") and 'enable_thinking=false, x="y"' in line
    assert "system message 'Be kind'" in line and line.endswith("an answer ends at 2 '</s>', 5 '<end>'")
    circuit = Circuit.load(tmp_path / "c.json")
    assert circuit.chat == {"args": {"enable_thinking": False, "x": "y"}, "system": "Be kind", "day": None}
    run = ["run", str(checkpoint), "-c", str(tmp_path / "c.json"), "-p", "hi", "--max-new-tokens", "2"]
    assert main([*run, *given]) == 0
    said = capsys.readouterr().err
    assert "chat template" in said and "found with" not in said
    assert main(run) == 0
    assert "c.json: found with {'args': {'enable_thinking': False" in capsys.readouterr().err
    assert main([*run, "--no-template", "--system", "x"]) == 2
    assert "--system: is for the chat template, not for --no-template" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["enable_thinking", "=x", "a-b=1"])
def test_template_arguments_without_a_name(checkpoint, capsys, word):
    with pytest.raises(SystemExit) as left:
        main(["run", str(checkpoint), "-p", "hi", "--template-arg", word])
    assert left.value.code == 2 and f"expected NAME=VALUE, got {word!r}" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["x=NaN", "x=-Infinity", "x=1e999", 'x={"a": 1, "a": 2}', 'x="\\ud800"'])
def test_template_arguments_that_json_does_not_have(checkpoint, capsys, word):
    with pytest.raises(SystemExit) as left:
        main(["run", str(checkpoint), "-p", "hi", "--template-arg", word])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "--template-arg: x: " in said and said.count("\n") == 1


def test_a_checkpoint_without_a_template_is_said_to_have_none(checkpoint, tmp_path, capsys):
    set_field(checkpoint, chat_template=None)
    assert discover(checkpoint, tmp_path) == 0
    assert "; plain text, the checkpoint has no chat template; with BOS; an answer ends" in capsys.readouterr().err
    assert discover(checkpoint, tmp_path, "--system", "x") == 2
    assert "has no chat template, which --system and --template-arg are for" in capsys.readouterr().err


def test_a_run_goes_on_with_the_day_on_which_it_began(checkpoint, tmp_path, capsys, monkeypatch):
    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    set_field(checkpoint, chat_template=DATED)
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "datetime", SimpleNamespace(datetime=Then))
        assert discover(checkpoint, tmp_path, "--run-dir", tmp_path / "run", "--unit", "4") == 0
    first = (tmp_path / "c.json").read_bytes()
    assert Circuit.load(tmp_path / "c.json").chat["day"] == "2024-07-26"
    (tmp_path / "run" / "parts" / "000001.safetensors").unlink()
    capsys.readouterr()
    assert discover(checkpoint, tmp_path, "--run-dir", tmp_path / "run", "--unit", "4") == 0
    assert "dated 2024-07-26" in capsys.readouterr().err and (tmp_path / "c.json").read_bytes() == first


def test_both_sides_from_one_labelled_file(checkpoint, tmp_path, capsys):
    lines = ["prompt,bad", *(f"{('close', 'open')[n % 2]} {n},{n % 2}" for n in range(24))]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    words = ["discover", str(checkpoint), "--positive", str(tmp_path / "all.csv"), "-o", str(tmp_path / "l.json")]
    words += ["--no-universal", "--top-k", "4"]
    assert main([*words, "--label", "bad"]) == 0
    found = Circuit.load(tmp_path / "l.json")
    assert [found.prompts[side]["count"] for side in ("positive", "negative")] == [12, 12]
    for side, parity in (("positive", 1), ("negative", 0)):
        texts = [line.split(",")[0] for line in lines[1:] if line.endswith(str(parity))]
        (tmp_path / f"{side}.txt").write_text("\n".join(texts))
    both = [*words[:2], "--positive", str(tmp_path / "positive.txt"), "--negative", str(tmp_path / "negative.txt")]
    assert main([*both, *words[4:]]) == 0
    assert Circuit.load(tmp_path / "l.json").neurons == found.neurons
    capsys.readouterr()
    assert main([*words, "--label", "bad", "--negative", "x"]) == 2
    assert "--label: is for one file that holds both sides" in capsys.readouterr().err


def test_token_ids_need_no_tokenizer(checkpoint):
    import torch

    ids = torch.tensor([[5, 9, 11]])
    expected = load(checkpoint)(ids)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    model = load(checkpoint)
    assert torch.equal(model(ids), expected)
    with pytest.raises(InputError, match="holds no tokenizer"):
        model.generate("hi")


def test_attribution_from_token_ids(checkpoint, tmp_path, capsys):
    """The circuit of the same prompts as text; and of a checkpoint that has no tokenizer."""
    assert discover(checkpoint, tmp_path) == 0
    expected = Circuit.load(tmp_path / "c.json")
    tokenizer = Tokenizer(checkpoint, TEXT_VOCABULARY)
    words = ["discover", str(checkpoint), "-o", str(tmp_path / "ids.json"), "--no-universal", "--top-k", "4"]
    for side, word in (("positive", "open"), ("negative", "close")):
        rows = tokenizer.encode_chat([f"{word} {n}" for n in range(12)])
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        words += [f"--{side}", str(tmp_path / f"{side}.jsonl")]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    assert main(words) == 0
    found = Circuit.load(tmp_path / "ids.json")
    assert found.neurons == expected.neurons and found.tokenizer_sha256 is None
    (tmp_path / "positive.jsonl").write_text('{"input_ids": [5, 999]}\n')
    assert main(words) == 2
    assert "positive.jsonl:1: input_ids: holds id 999, beyond the model's 262 rows" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["run", "-p", "hi"], ["sweep", "--m", "0", "--harmful", "FILES/positive.txt"]])
def test_commands_say_that_a_circuit_was_found_on_plain_text(checkpoint, tmp_path, capsys, words):
    assert discover(checkpoint, tmp_path, "--no-template") == 0
    name, *more = (word.replace("FILES", str(tmp_path)) for word in words)
    command = [name, str(checkpoint), *more, "-c", str(tmp_path / "c.json"), "--max-new-tokens", "2"]
    wanted = "c.json: chat_template_sha256: found on plain text, here prompts go through the chat template"
    for flags, lines in (([], 1), (["--any-model"], 1), (["--no-template"], 0)):
        capsys.readouterr()
        assert main([*command, *flags]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "found on plain" in line]
        assert len(said) == lines and all(wanted in line and "--no-template" in line for line in said)


def test_an_export_has_no_prompts_for_a_template(checkpoint, tmp_path, capsys):
    assert discover(checkpoint, tmp_path, "--no-template") == 0
    capsys.readouterr()
    target = ["--to", "ref-code", "-o", str(tmp_path / "public.json")]
    assert main(["export", str(checkpoint), "-c", str(tmp_path / "c.json"), *target]) == 0
    assert "template" not in capsys.readouterr().err
