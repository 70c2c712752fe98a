"""Many questions in one pass: contrast files, positions, bootstrap, folds, and the universal filter as columns."""

import json
import re
from tempfile import TemporaryFile

import pytest
import torch
from safetensors.torch import load_file

from cna_kernels import Circuit, InputError
from cna_kernels.model import load
from cna_kernels.model.cli import main
from cna_kernels.model.discovery import collect
from cna_kernels.model.discovery.job import Job
from cna_kernels.model.discovery.settings import settings_from
from cna_kernels.model.discovery.units import SlotSums
from cna_kernels.model.prompts.corpus import Contrast, Corpus, Entry, Names, contrasts_of, read_contrasts, two_sets
from tiny import TEMPLATE, set_field, write_language_model

pytest.importorskip("transformers")

POSITIVE = ["open it", "why not", "I would like the other one", "x", "one two three", "a b c d e f", "again"]
NEGATIVE = ["close", "the door was open all night", "yes", "12345", "what is this called", "no no", "ok", "hm"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_language_model(tmp_path_factory.mktemp("llama"), intermediate_size=200))


def places(texts, name):
    return [(text, f"{name}:{number}") for number, text in enumerate(texts)]


def job_of(model, positive=POSITIVE, negative=NEGATIVE, *, neutral=(), file, **settings):
    names = Names()
    corpus = Corpus(file, two_sets(names, places(positive, "p"), places(negative, "n"), places(neutral, "u")), names)
    return Job(model, corpus, [Contrast("circuit", 0, 1)], settings_from(universal=bool(neutral), **settings))


def same(one, other, relative=1e-5):
    assert one.pairs == other.pairs
    for (_, _, got), (_, _, want) in zip(one.neurons, other.neurons, strict=True):
        assert abs(got - want) <= relative * abs(one.neurons[0][2])
    assert one.positive_mean == pytest.approx(other.positive_mean, rel=relative, abs=relative * abs(one.neurons[0][2]))


def test_replicates_equal_explicit_resampling(model):
    """Every replicate's sums equal those of a list that repeats each prompt as often as it was drawn."""
    with TemporaryFile() as file:
        job = job_of(model, file=file, top_k=15, bootstrap=5, seed=3)
        columns, total = job.how.columns, job.run_all()
        entries = job.corpus.read(0)
        _, drawn = columns.weights(entries, 0)  # [P, 2 + 10]
        whole = job.circuits(total)["circuit"]
    selected = []
    for replicate in range(5):
        counts = (drawn[:, 2 + replicate] + drawn[:, 7 + replicate]).int().tolist()
        sides = [
            [e.text for e, n in zip(entries, counts, strict=True) if e.columns[0][0] == c for _ in range(n)]
            for c in (0, 1)
        ]
        explicit = model.discover(*sides, top_k=15, universal_prompts=False)
        for column, side in enumerate(sides):
            slot = total.slot(columns.derived(column)[replicate])
            assert slot.count == len(side)
        means = [total.slot(columns.derived(c)[replicate]).total / len(sides[c]) for c in (0, 1)]
        delta = means[0] - means[1]
        assert all(
            abs(delta[layer, index] - value) <= 1e-5 * abs(explicit.neurons[0][2])
            for layer, index, value in explicit.neurons
        )
        selected.append(set(explicit.pairs))
    frequency = [sum(pair in chosen for chosen in selected) / 5 for pair in whole.pairs]
    assert whole.bootstrap["frequency"] == frequency and min(sum(frequency), 15 - sum(frequency)) > 0
    assert whole.bootstrap["overlap"] == pytest.approx(sum(frequency) / 15)
    pairwise = [len(a & b) / 15 for a in selected for b in selected if a is not b]
    assert whole.bootstrap["pairwise_overlap"] == pytest.approx(sum(pairwise) / len(pairwise))
    often = {pair for chosen in selected for pair in chosen if sum(pair in c for c in selected) >= 2.5}
    assert {(layer, index) for layer, index, _ in whole.bootstrap["others"]} == often - set(whole.pairs)


def test_folds_equal_leaving_prompts_out(model):
    with TemporaryFile() as file:
        circuit = job_of(model, file=file, top_k=15, folds=3)
        circuit = circuit.circuits(circuit.run_all())["circuit"]
    plain = model.discover(POSITIVE, NEGATIVE, top_k=15, universal_prompts=False)
    same(circuit, plain)
    for fold in range(3):
        kept = [[text for turn, text in enumerate(side) if turn % 3 != fold] for side in (POSITIVE, NEGATIVE)]
        left = [[text for turn, text in enumerate(side) if turn % 3 == fold] for side in (POSITIVE, NEGATIVE)]
        train = model.discover(*kept, top_k=15, universal_prompts=False)
        assert circuit.folds["overlap"][fold] == len(set(train.pairs) & set(plain.pairs)) / 15
        test = {n[:2]: n[2] for n in model.discover(*left, top_k=600, universal_prompts=False).neurons}
        held_out = sum(test[layer, index] * (1 if value > 0 else -1) for layer, index, value in train.neurons)
        assert circuit.folds["retained"][fold] == pytest.approx(
            held_out / sum(abs(n[2]) for n in train.neurons), abs=1e-4
        )


def test_units_in_any_order_are_the_whole(model):
    """A resumed run: units are chosen by number, each with its own prompts; progress counts the prompts done before."""
    with TemporaryFile() as file:
        names, seen = Names(), []
        corpus = Corpus(file, two_sets(names, places(POSITIVE, "p"), places(NEGATIVE, "n")), names, unit=4)
        job = Job(model, corpus, [Contrast("circuit", 0, 1)], settings_from(top_k=15, universal=False, bootstrap=3))
        parts = dict(job.run([3, 0], progress=lambda *facts: seen.append(facts), done=8))
        assert list(parts) == [3, 0] and [part.n_prompts for part in parts.values()] == [3, 4]
        parts |= job.run([2, 1])
        whole = job.run_all()
    assert seen[0] == (8, 15, 0) and seen[-1][:2] == (15, 15)
    assert seen[-1][2] == parts[3].n_tokens + parts[0].n_tokens
    for slot, sums in whole.slots.items():
        mine = [part.slots[slot] for part in parts.values() if slot in part.slots]
        assert sum(part.count for part in mine) == sums.count
        assert (sum(part.total for part in mine) - sums.total).abs().max() <= 1e-9 * sums.total.abs().max() + 1e-12
    assert parts[0].slot(0).total.abs().max() > 0 and 1 not in parts[0].slots, "the first four are positive"


def test_sums_without_squares_do_not_join_those_with_them():
    with_squares, without = (SlotSums(torch.ones(1, 2), squares, 1.0) for squares in (torch.ones(1, 2), None))
    with pytest.raises(ValueError, match="other: kept no squares"):
        with_squares += without
    assert with_squares.total.sum() == 2 and with_squares.count == 1


def test_derived_columns_change_nothing_else(model):
    plain = model.discover(POSITIVE, NEGATIVE, top_k=15)
    with_all = model.discover(POSITIVE, NEGATIVE, top_k=15, bootstrap=20, folds=2)
    assert with_all.neurons == plain.neurons and with_all.universal == plain.universal


def test_a_circuit_with_its_stability_survives_its_file(model, tmp_path):
    circuit = model.discover(POSITIVE, NEGATIVE, top_k=15, bootstrap=4, folds=2)
    circuit.save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json") == circuit


@pytest.mark.parametrize(
    ("field", "name", "value"),
    [
        ("bootstrap", "frequency", [0.5]),
        ("bootstrap", "frequency", ["x"] * 15),
        ("bootstrap", "others", [[1, 2]]),
        ("bootstrap", "overlap", "high"),
        ("folds", "n", 0),
        ("folds", "overlap", ["x", 1.0]),
        ("folds", "retained", [1.0]),
    ],
)
def test_stability_that_is_not_as_written(model, tmp_path, field, name, value):
    path = tmp_path / "c.json"
    model.discover(POSITIVE, NEGATIVE, top_k=15, bootstrap=4, folds=2).save(path)
    record = json.loads(path.read_text())
    record[field][name] = value
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"c\.json: {field}\.{name}(\[\d\])?: expected"):
        Circuit.load(path)


@pytest.mark.parametrize("position", ["last", "all", "answer"])
def test_positions(model, position):
    """Which tokens count, against the plain forward pass; all prompts count equally, whatever their length."""
    from cna_kernels import ActivationSums
    from cna_kernels.model.transformer import Tap

    entries = [Entry(text, "p", ((0, 1.0, 0),), answer="well: " + text[:4]) for text in POSITIVE]
    prompts = model.encoder.encode_entries(entries, position=position)
    chats = model.tokenizer.encode_chat(POSITIVE)
    total = 0
    for prompt, chat, entry in zip(prompts, chats, entries, strict=True):
        first = {"last": len(chat) - 1, "all": 1, "answer": len(chat)}[position]  # the first token is the BOS
        assert chat[0] == model.tokenizer.bos_id
        assert prompt.ids == chat + (model.tokenizer.encode_answer(entry.answer) if position == "answer" else [])
        token_weight = torch.zeros(len(prompt.ids), 1)
        token_weight[first:] = 1 / (len(prompt.ids) - first)
        alone = ActivationSums(3, 200, 1)
        model.transformer(torch.tensor([prompt.ids]), tap=Tap(alone, token_weight))
        alone.fold(token_weight)
        total = total + alone.total[:, 0]
    with TemporaryFile() as file:
        corpus = Corpus(file, iter([*entries, Entry("other", "n", ((1, 1.0, 0),), answer="a")]), names_of("p", "n"))
        job = Job(model, corpus, [Contrast("c", 0, 1)], settings_from(position=position, universal=False))
        part = job.run_all()
    assert part.slot(0).count == len(POSITIVE)
    assert (part.slot(0).total - total).abs().max() <= 1e-5 * total.abs().max()


def names_of(*columns):
    names = Names()
    for column in columns:
        names(column)
    return names


def write_contrasts(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


CONTRASTS = [
    *({"prompt": text, "columns": ["door.positive", "all"]} for text in POSITIVE),
    *({"prompt": text, "columns": {"door.negative": 1, "night.positive": 0.5}} for text in NEGATIVE),
    *({"prompt": text, "columns": ["night.negative"]} for text in POSITIVE[:3]),
]


def test_a_contrast_file_answers_many_questions(model, tmp_path, capsys):
    path = write_contrasts(tmp_path / "c.jsonl", CONTRASTS)
    arguments = [
        "discover",
        str(model.directory),
        "--contrasts",
        str(path),
        "-o",
        str(tmp_path / "out"),
        "--top-k",
        "9",
    ]
    (tmp_path / "out").mkdir()
    assert main([*arguments, "--bootstrap", "10", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for name, sides in (("door", (POSITIVE, NEGATIVE)), ("night", (NEGATIVE, POSITIVE[:3]))):
        circuit = Circuit.load(tmp_path / "out" / f"{name}.json")
        same(circuit, model.discover(*sides, top_k=9))
        assert shown[name] == json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert [side["count"] for side in circuit.prompts.values()] == [len(side) for side in sides]
    columns = load_file(tmp_path / "out" / "columns.safetensors")
    assert columns["night.positive/count"].item() == len(NEGATIVE) / 2 and columns["all/count"].item() == 7
    acts = torch.stack([model_act(model, text) for text in POSITIVE])
    assert (columns["all/mean"] - acts.mean(0)).abs().max() < 1e-6
    assert (columns["all/variance"] - acts.var(0)).abs().max() < 1e-5
    assert torch.equal(columns["all/mean"], columns["door.positive/mean"])


def model_act(model, text):
    """act at the last token, [L, N] fp64."""
    from cna_kernels import ActivationSums
    from cna_kernels.model.transformer import Tap

    ids = model.tokenizer.encode_chat([text])[0]
    sums, token_weight = ActivationSums(3, 200, 1), torch.zeros(len(ids), 1)
    token_weight[-1] = 1
    model.transformer(torch.tensor([ids]), tap=Tap(sums, token_weight))
    sums.fold(token_weight)
    return sums.total[:, 0]


def test_universal_contrasts(model, tmp_path):
    """Neurons among the top 0.1% on a fifth of the diverse contrasts are left out."""
    own = write_contrasts(tmp_path / "c.jsonl", CONTRASTS)
    diverse = write_contrasts(
        tmp_path / "u.jsonl",
        [{"prompt": text, "columns": [f"{n}.{side}"]} for n in range(5) for side, text in
         (("positive", POSITIVE[n]), ("negative", NEGATIVE[n]))],
    )  # fmt: skip
    names = Names()
    with TemporaryFile() as file:
        entries = [*read_contrasts(own, names), *read_contrasts(diverse, names, prefix="universal/")]
        corpus = Corpus(file, entries, names)
        contrasts = contrasts_of(corpus.columns, own)
        job = Job(model, corpus, contrasts[:1], settings_from(top_k=9, universal_threshold=0.2), diverse=contrasts[2:])
        circuit = job.circuits(job.run_all())["door"]
    votes = torch.zeros(600)
    for n in range(5):
        delta = model_act(model, POSITIVE[n]) - model_act(model, NEGATIVE[n])
        votes[delta.abs().argmax()] += 1  # 0.1% of 600 is 1
    universal = [list(divmod(int(place), 200)) for place in (votes >= 1).nonzero()[:, 0]]
    assert universal and circuit.universal["excluded"] == universal and circuit.universal["prompts"] == 5
    assert not set(map(tuple, universal)) & set(circuit.pairs)


BAD_LINES = [
    ('"text"', ":2: expected a JSON object"),
    ('{"prompt": "a"}', ":2: columns: is missing"),
    ('{"prompt": "a", "columns": []}', ":2: columns: expected names"),
    ('{"prompt": "a", "columns": [3]}', ":2: columns: expected names"),
    ('{"prompt": "a", "columns": {"x": 0}}', ":2: columns.x: expected a number from 1e-06 to 1e+06"),
    ('{"prompt": "a", "columns": {"x": true}}', ":2: columns.x: expected a number from 1e-06 to 1e+06"),
    ('{"prompt": "a", "columns": ["../x"]}', ":2: columns: expected printable names without slashes"),
    ('{"prompt": "", "columns": ["x"]}', ":2: prompt: expected a prompt"),
    ('{"columns": ["x"]}', ":2: has no column 'prompt'"),
    ('{"prompt": "a", "columns": ["x"], "label": 1}', ":2: label: not a field of a contrast file"),
    ('{"prompt": "a", "columns": ["x"], "answer": 1}', ":2: answer: expected a prompt"),
    ('{"prompt": "a", "columns": ["x.positive"]}', "c.jsonl: x.positive: no prompt is in 'x.negative'"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_contrast_files(tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "a", "columns": ["a.positive", "a.negative"]}\n' + line + "\n")
    with pytest.raises(InputError) as caught:
        names = Names()
        list(read_contrasts(path, names))
        contrasts_of(names.number, path)
    assert message in str(caught.value)


def test_refusals(model):
    with pytest.raises(InputError, match=r"positive\[0\]: has no answer, which position 'answer' counts"):
        model.discover(POSITIVE, NEGATIVE, position="answer")
    with pytest.raises(InputError, match="folds: expected at most 7, the prompts of the smaller set of 'circuit'"):
        model.discover(POSITIVE, NEGATIVE, folds=8)
    for options, message in (
        ({"position": "first"}, "position: expected one of last, all, answer, got 'first'"),
        ({"bootstrap": -1}, "bootstrap: expected 2 to 10000 replicates"),
        ({"folds": 1}, "folds: expected 2 to 1000"),
        ({"bootstrap": 1}, "bootstrap: expected 2 to 10000 replicates, or 0 for none, got 1"),
        ({"score": "cohen-d", "position": "all"}, "score: cohen-d compares prompts, and is for position 'last' only"),
        ({"seed": -1}, "seed: expected 0 to"),
    ):
        with pytest.raises(InputError, match=message):
            model.discover(POSITIVE, NEGATIVE, **options)


def test_prompts_that_are_too_long_are_skipped_on_demand(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("one\n\xff" + "x" * 100 + "\ntwo\n")
    (tmp_path / "n.txt").write_bytes(b"one\n\xff\xfe\nthree\n")
    command = ["discover", str(model.directory), "--positive", str(tmp_path / "p.txt"), "--negative"]
    command += [str(tmp_path / "n.txt"), "-o", str(tmp_path / "c.json"), "--top-k", "5"]
    assert main(command) == 2
    assert "n.txt:2: is not UTF-8 text" in capsys.readouterr().err and not (tmp_path / "c.json").exists()
    assert main([*command, "--skip-bad"]) == 0
    error = capsys.readouterr().err
    assert "2 skipped" in error and "skipped 2, the first:" in error and "n.txt:2" in error
    same(Circuit.load(tmp_path / "c.json"), model.discover(["one", "two"], ["one", "three"], top_k=5))


def test_json_log(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n".join(POSITIVE))
    (tmp_path / "n.txt").write_text("\n".join(text + "!" for text in POSITIVE))
    command = ["discover", str(model.directory), "--positive", str(tmp_path / "p.txt"), "--negative"]
    command += [str(tmp_path / "n.txt"), "-o", str(tmp_path / "c.json"), "--top-k", "5", "--no-universal", "--log-json"]
    assert main(command) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert lines[-1]["event"] == "done" and lines[-1]["prompts"] == lines[-1]["of"] == 14
    tokens = sum(len(ids) for ids in model.tokenizer.encode_chat([*POSITIVE, *(text + "!" for text in POSITIVE)]))
    assert lines[-1]["tokens"] == tokens and lines[-1]["memory_bytes"] > 1e6 and lines[0]["event"] == "progress"


def test_batch_auto_measures_once_and_says_what_it_chose(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("\n".join(POSITIVE))
    (tmp_path / "n.txt").write_text("\n".join(text + "!" for text in POSITIVE))
    command = ["discover", str(model.directory), "--positive", str(tmp_path / "p.txt"), "--negative"]
    command += [str(tmp_path / "n.txt"), "-o", str(tmp_path / "c.json"), "--top-k", "5", "--no-universal"]
    command += ["--run-dir", str(tmp_path / "run")]
    assert main([*command, "--batch", "auto"]) == 0
    said = re.search(r"batch: (\d+) tokens a forward pass, as --batch-tokens \1", capsys.readouterr().err)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["batch_tokens"] == int(said[1])
    first = (tmp_path / "c.json").read_bytes()
    for more in (["--batch", "auto"], ["--batch-tokens", said[1]]):  # the run keeps the batch of its start
        assert main([*command, *more]) == 0
        assert "tokens/s by size" not in capsys.readouterr().err and (tmp_path / "c.json").read_bytes() == first


def test_batch_auto_stops_where_memory_ends(model, monkeypatch):
    whole = collect.forward

    def small_memory(transformer, packed, *rest, **options):
        if packed.n_tokens > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(transformer, packed, *rest, **options)

    monkeypatch.setattr(collect, "forward", small_memory)
    prompts = model.encoder.encode_entries([Entry(text, "p") for text in POSITIVE])
    size, rates = collect.measure_tokens(model.transformer, prompts, 2, squares=True)
    assert list(rates) == [256, 512] and size in rates


def run(words, capsys):
    """(exit code, stdout, stderr) of the command line."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def discover_files(model, tmp_path, positive=POSITIVE, negative=NEGATIVE):
    (tmp_path / "p.txt").write_text("\n".join(positive))
    (tmp_path / "n.txt").write_text("\n".join(negative))
    words = ["discover", model.directory, "--positive", tmp_path / "p.txt", "--negative", tmp_path / "n.txt"]
    return [*words, "-o", tmp_path / "c.json", "--top-k", "5"]


def test_universal_files_turn_the_filter_on(model, tmp_path, capsys):
    """Also beside two prompt files, and with a preset that has no filter."""
    lines = [
        {"prompt": text, "columns": [f"{n % 3}.{('positive', 'negative')[n % 2]}"]} for n, text in enumerate(POSITIVE)
    ]
    diverse = write_contrasts(tmp_path / "u.jsonl", lines)
    words = discover_files(model, tmp_path)
    for more, votes in ((["--universal-contrasts", diverse], 3), (["--universal-prompts", tmp_path / "p.txt"], 7)):
        for preset in ([], ["--preset", "ref-code"]):
            assert run([*words, *more, *preset], capsys)[0] == 0
            assert Circuit.load(tmp_path / "c.json").universal["prompts"] == votes
    write_contrasts(tmp_path / "u.jsonl", [{"prompt": "a", "columns": ["x"]}])
    code, _, error = run([*words, "--universal-contrasts", diverse], capsys)
    assert code == 2 and "u.jsonl: holds no pair of columns NAME.positive, NAME.negative" in error


def test_skipped_prompts_are_not_counted(model, tmp_path, capsys):
    words = discover_files(model, tmp_path, positive=[*POSITIVE, "x" * 90])
    assert run(words, capsys)[0] == 2
    assert run([*words, "--skip-bad"], capsys)[0] == 0
    assert Circuit.load(tmp_path / "c.json").prompts["positive"]["count"] == len(POSITIVE)
    words = discover_files(model, tmp_path, positive=["x" * 90])
    code, _, error = run([*words, "--skip-bad"], capsys)
    assert code == 2 and "circuit: no prompt is left in one of its two sets" in error
    lines = [*CONTRASTS, {"prompt": "x" * 90, "columns": ["empty"]}]
    words = ["discover", model.directory, "--contrasts", write_contrasts(tmp_path / "c.jsonl", lines), "--skip-bad"]
    assert run([*words, "-o", tmp_path / "out", "--top-k", "5"], capsys)[0] == 0
    columns = load_file(tmp_path / "out" / "columns.safetensors")
    assert columns["empty/count"].item() == 0 and "empty/mean" not in columns


def test_folds_of_alternating_lines(model, tmp_path, capsys):
    lines = [{"prompt": f"{n} or {n * n}", "columns": [("a.positive", "a.negative")[n % 2]]} for n in range(12)]
    words = ["discover", model.directory, "--contrasts", write_contrasts(tmp_path / "c.jsonl", lines), "--folds", "3"]
    assert run([*words, "-o", tmp_path / "out", "--top-k", "5"], capsys)[0] == 0
    assert Circuit.load(tmp_path / "out" / "a.json").folds["n"] == 3


def test_a_contrast_of_nothing(model, tmp_path, capsys):
    """The same prompts on both sides; and prompts that differ before what the model sees of them."""
    for negative in (["a b", "c"], ["c", "a b"]):
        words = discover_files(model, tmp_path, positive=["a b", "c"], negative=negative)
        code, _, error = run(words, capsys)
        assert code == 2 and "positive, negative: both sets hold the same prompts" in error
    words = discover_files(model, tmp_path, positive=["a", "b", "c"], negative=["a", "b", "d"])
    code, _, error = run(words, capsys)
    assert code == 0 and "50% of the prompts are shared by both sets" in error
    assert "3 and 3 prompts, fewer than 10 on a side" in error
    words = discover_files(model, tmp_path, positive=["a", "b"], negative=["c", "d"])
    set_field(model.directory, chat_template="the same for all")
    try:
        code, _, error = run(words, capsys)
    finally:
        set_field(model.directory, chat_template=TEMPLATE)
    assert code == 2 and "positive, negative: the sides differ by no more than rounding" in error


def test_answers_are_looked_for_before_the_work(model, tmp_path, capsys):
    lines = [line | {"answer": "yes"} for line in CONTRASTS]
    del lines[5]["answer"]
    words = ["discover", model.directory, "--contrasts", write_contrasts(tmp_path / "c.jsonl", lines), "--top-k", "5"]
    words += ["-o", tmp_path / "out", "--position", "answer"]
    code, _, error = run(words, capsys)
    assert code == 2 and "c.jsonl:6: prompt: has no answer, which position 'answer' counts" in error
    assert run([*words, "--skip-bad"], capsys)[0] == 0
    assert "door.positive/variance" not in load_file(tmp_path / "out" / "columns.safetensors")


@pytest.mark.exhaustive
def test_more_sums_than_memory_holds(model):
    names = Names()
    with TemporaryFile() as file:
        corpus = Corpus(file, two_sets(names, places(POSITIVE, "p"), places(NEGATIVE, "n")), names)
        names.number.update({f"x{n}": n + 2 for n in range(3_000_000)})
        corpus.columns = tuple(names.number)
        with pytest.raises(InputError, match=r"columns, bootstrap, folds: 3000002 sums of 3 x 200 neurons need \d+"):
            Job(model, corpus, [Contrast("c", 0, 1)], settings_from(top_k=5))


def test_options_that_do_not_go_together(model, tmp_path, capsys):
    words = discover_files(model, tmp_path)
    for more, message in (
        (["--batch", "3", "--batch-tokens", "9"], "--batch-tokens: give it, or --batch"),
        (["--spill", tmp_path], "--spill: expected a directory, and --stream-layers"),
        (["--spill", "nowhere", "--stream-layers"], "--spill: expected a directory, and --stream-layers"),
        (
            ["--contrasts", "c.jsonl"],
            "prompts: give --positive and --negative, or --positive with --label, or --contrasts",
        ),
    ):
        code, _, error = run([*words, *more], capsys)
        assert code == 2 and message in error and error.count("\n") == 1
