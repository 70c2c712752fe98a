"""Rank 0 leads: logits, answers and circuits are those of one process; errors end all ranks, each in a line.

Run by pytest, this file starts itself as 2 and as 4 processes. Rank 0 does all the work once and writes what it has
found; the tests compare this with a whole model.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from cna_kernels import ActivationSums, Circuit, InputError, plans
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery import collect
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.evaluation.directions import Direction, DirectionTable, mean_states
from cna_kernels.model.evaluation.relp import relevance
from cna_kernels.model.generate import Sampling, generate
from cna_kernels.model.parallel import lead as leading
from cna_kernels.model.parallel import tensor_parallel
from cna_kernels.model.transformer import Steering
from rank_processes import run_ranks
from tiny import VARIANTS, write_checkpoint

# number of ranks -> the variants that run on them; and those that answer, too
RANKS = {2: tuple(VARIANTS), 4: ("llama", "llama-bias", "llama-mlp-bias", "mistral", "qwen2-tied", "qwen3")}
ANSWERING = ("llama", "llama-mlp-bias", "mistral", "qwen2-tied")
HEADS = dict(num_attention_heads=8, num_key_value_heads=4)
N_LAYERS, N_NEURONS, N_HIDDEN, N_VOCABULARY = 3, 48, 32, 97
N_NEW, LONG = 64, 128  # tokens of an answer, and of a context that holds it
HEADER = list(range(5, 17))  # long enough for a pass of its own
MARGIN = 30  # two tokens are told apart if their logits are so many rounding errors apart
CLOSE = 4  # times what two backends of one process differ by

# on both, on the first, on the last rank; aligned with neurons on both
CIRCUITS = [
    Circuit(((0, 3, 1.0), (0, 40, -1.0), (2, 24, 2.0)), N_LAYERS, N_NEURONS),
    Circuit(((1, 0, 1.0), (1, 11, 1.0)), N_LAYERS, N_NEURONS),
    Circuit(tuple((layer, N_NEURONS - 1 - layer, 1.0) for layer in range(3)), N_LAYERS, N_NEURONS),
    Circuit(((2, 5, 1.0), (2, 45, 1.0), (0, 23, 1.0)), N_LAYERS, N_NEURONS, mirrored=((2, 45), (2, 5))),
]
MULTIPLIERS = [0.0, 30.0, -20.0, 4.0]


def sequences():
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, N_VOCABULARY, (5, 9), generator=draw)


def prompts(header=()):
    draw = random.Random(1)
    rows = [[*header, *(draw.randrange(3, 90) for _ in range(n))] for n in (1, 7, 3, 12, 5, 2)]
    return [TokenPrompt(ids, f"p{number}") for number, ids in enumerate(rows)]


def steered(transformer, rows):
    table = transformer.new_table(CIRCUITS, MULTIPLIERS)
    return Steering(table, table.row_circuit(rows))


def directions():
    draw = torch.Generator().manual_seed(5)
    of_layers = [torch.randn(N_LAYERS, N_HIDDEN, generator=draw) for _ in range(2)]
    unit = torch.nn.functional.normalize(torch.randn(1, N_HIDDEN, generator=draw))
    found = [Direction(*pair) for pair in zip(("residual", "mlp", "writes"), (*of_layers, unit), strict=True)]
    return DirectionTable(found, [0.5, -0.5, 1.0], N_LAYERS, N_HIDDEN)


def logits_of(transformer):
    """Plain, with a circuit for each row, with a direction for each row."""
    ids = sequences()
    edit = directions().row_direction([-1, 0, 1, 2, 0])
    with torch.inference_mode():
        given = [None, steered(transformer, [-1, 0, 1, 2, 3]), Steering(None, None, edit)]
        return [transformer(ids, steer=steer) for steer in given]


def changes_of(transformer):
    """Logits before and after each change of a table."""
    table, found = transformer.new_table(CIRCUITS[:2], [1.0, 1.0]), []
    steer = Steering(table, table.row_circuit([0, 0, 1, 1, 1]))
    for change in (
        lambda: None,
        lambda: table.set_multipliers([0.0, 30.0]),
        lambda: table.replace(0, CIRCUITS[1], [40.0, -3.0]),
        lambda: table.remove(1),
    ):
        change()
        found.append(transformer(sequences(), steer=steer))
    return found


def greedy(transformer, given, **options):
    return generate(transformer, given, max_new_tokens=N_NEW, stop_ids=frozenset(), **options)


def answers_of(transformer):
    """Greedy, with a circuit for each row; with a beginning that all share and rows that are steered alike."""
    return {
        "steered": greedy(transformer, prompts(), steer=steered(transformer, [-1, 0, 1, 2, 3, 3])),
        "shared": greedy(transformer, prompts(HEADER), steer=steered(transformer, [-1, 2, 2, -1, 2, 2])),
    }


def sampled_of(transformer):
    """Rows that end at different times, so that the cache drops rows."""
    how = dict(max_new_tokens=40, stop_ids=frozenset(range(0, 97, 8)), seeds=[4, 5, 6, 7, 8, 9])
    return generate(transformer, prompts(), sampling=Sampling(0.8, 20, 0.95), **how)


def sums_of(transformer):
    sums = ActivationSums(N_LAYERS, N_NEURONS, 2, squares=True)
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    collect.collect(transformer, prompts(HEADER), weights, sums, max_tokens=40)
    return [sums.total, sums.total_sq]


def found_by(transformer, variant):
    found = {"logits": logits_of(transformer), "sums": sums_of(transformer)}
    if variant in ANSWERING:
        found["answers"], found["sampled"] = answers_of(transformer), sampled_of(transformer)
    return found


def message(call):
    try:
        call()
    except (InputError, leading.RanksFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# What the ranks do.


def work(directory, n_ranks, lead):
    """What rank 0 does, alone."""
    config, found = read_config(directory / "llama"), {}
    for variant in RANKS[n_ranks]:
        found[variant] = found_by(load_led(directory / variant, lead), variant)
    llama = load_led(directory / "llama", lead)
    found["changes"] = changes_of(llama)
    found["columns"] = llama.down_columns(1, [0, 47, 23])
    found["states"] = mean_states(llama, prompts())
    found["bfloat16"] = logits_of(load_led(directory / "qwen3", lead, dtype=torch.bfloat16))
    found["cache bytes"] = llama.cache_bytes(2, 10), config.num_hidden_layers
    found["table"] = message(lambda: llama.new_table(CIRCUITS[:1], [float("nan")]))
    found["after"] = llama(sequences())  # bad input, which rank 0 alone has seen, has ended nothing
    found["relevance"] = message(lambda: relevance(llama, prompts(), [5], [6]))
    found["batch"] = message(lambda: collect.measure_tokens(llama, prompts(), 2, squares=False))
    found["device"] = message(lambda: load_led(directory / "llama", lead, device="meta"))
    long = [TokenPrompt(list(range(3, 90)) * 2, "p0")]
    sums = ActivationSums(N_LAYERS, N_NEURONS, 1)
    found["too long"] = message(lambda: collect.collect(llama, long, torch.ones(1, 1), sums))
    found["ended"] = message(lambda: llama(sequences()))
    return found


def load_led(directory, lead, **options):
    return lead.load(directory, read_config(directory), open_checkpoint(directory), **options)


def run_rank(directory):
    """One rank: rank 0 writes what it has found, another rank what it has held."""
    rank, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    held, alive = [], []
    begin = leading._Calls.begin

    def noted(calls, *args):
        alive.append(sum(cache() is not None for cache in held))
        cache = begin(calls, *args)
        held.append(weakref.ref(cache))
        return cache

    leading._Calls.begin = noted
    found = leading.run_led(lambda lead: work(directory, n_ranks, lead))
    torch.save(found if rank == 0 else {"alive": alive}, directory / f"{n_ranks}-{rank}.pt")


FAULTS = {}  # name -> what happens to a rank at its third step


def fault(run):
    FAULTS[run.__name__.replace("_", " ")] = run


@fault
def killed():
    os.kill(os.getpid(), signal.SIGKILL)


@fault
def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


def run_faulty(name, culprit, words):
    """The command line on a rank, one of which fails within its third step."""
    from cna_kernels.model.cli import main

    step, steps = tensor_parallel.ParallelTransformer.step, []

    def failing(*args):
        steps.append(time.time())
        if len(steps) == 3 and os.environ["RANK"] == culprit:
            FAULTS[name]()
        return step(*args)

    tensor_parallel.ParallelTransformer.step = failing
    code = main(words)
    print("ended", time.time() - steps[2])
    return code


# Tests of what they have found.


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("checkpoints")
    for variant in VARIANTS:
        context = {} if variant == "llama-rope-dynamic" else dict(max_position_embeddings=LONG)
        write_checkpoint(variant, directory / variant, **HEADS, **context)
    return directory


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.rare)])
def n_ranks(request, directory):
    done = run_ranks(request.param, __file__, directory)
    assert done == [(0, "", "")] * request.param, "nothing is said"
    return request.param


@pytest.fixture(scope="module")
def found(n_ranks, directory):
    return torch.load(directory / f"{n_ranks}-0.pt", weights_only=False)


def load_whole(directory, dtype=torch.float32):
    return load_transformer(directory, read_config(directory), open_checkpoint(directory), dtype=dtype)


@pytest.fixture
def assert_close(monkeypatch):
    """Assert that tensors are those of one process, but for rounding: of two backends of one process."""

    def check(found, run, transformer):
        monkeypatch.setenv("CNA_BACKEND", "reference")
        plans.forget()
        other = run(transformer)
        monkeypatch.delenv("CNA_BACKEND")
        plans.forget()
        wanted = run(transformer)
        for mine, one, two in zip(found, wanted, other, strict=True):
            rounding = (one - two).abs().max()
            assert 0 < rounding < 0.02 * one.abs().max()
            assert (mine - one).abs().max() <= CLOSE * rounding
        return wanted

    return check


def test_logits_are_those_of_one_process(found, n_ranks, directory, assert_close):
    for variant in RANKS[n_ranks]:
        given = assert_close(found[variant]["logits"], logits_of, load_whole(directory / variant))
        plain, by_circuits, by_directions = given
        for row in range(1, 5):  # every circuit and every direction shows far beyond rounding
            assert (by_circuits[row] - plain[row]).abs().max() > 0.01, (variant, row)
            assert (by_directions[row] - plain[row]).abs().max() > 0.01, (variant, row)
        torch.testing.assert_close(by_circuits[0], plain[0], rtol=1e-4, atol=1e-5)
    assert_close(found["bfloat16"], logits_of, load_whole(directory / "qwen3", torch.bfloat16))


def smallest_margin(transformer, ids, n_prompt, steer):
    """How much the answer's tokens have more than the runners-up, at the least."""
    with torch.inference_mode():
        top = transformer(torch.tensor([ids[:-1]]), steer=steer)[0, n_prompt - 1 :].topk(2).values
    return (top[:, 0] - top[:, 1]).min().item()


def test_answers_are_those_of_one_process(found, n_ranks, directory):
    rows = {"steered": [-1, 0, 1, 2, 3, 3], "shared": [-1, 2, 2, -1, 2, 2]}
    for variant in ANSWERING:
        whole = load_whole(directory / variant)
        logits, single = found[variant]["logits"], logits_of(whole)
        rounding = max((x - y).abs().max().item() for x, y in zip(logits, single, strict=True))
        expected, told_apart = answers_of(whole), 0
        table = whole.new_table(CIRCUITS, MULTIPLIERS)
        for kind, answers in expected.items():
            given = prompts(HEADER if kind == "shared" else ())
            for row, (prompt, answer) in enumerate(zip(given, answers, strict=True)):
                assert len(answer) == N_NEW
                steer = Steering(table, table.row_circuit([rows[kind][row]]))
                if smallest_margin(whole, [*prompt.ids, *answer], len(prompt.ids), steer) > MARGIN * rounding:
                    assert found[variant]["answers"][kind][row] == answer, (variant, kind, row)
                    told_apart += 1
        assert told_apart >= 8, f"{variant}: of 12 answers"


def test_sampled_answers_are_those_of_one_process(found, n_ranks, directory):
    lengths = set()
    for variant in ANSWERING:
        expected = sampled_of(load_whole(directory / variant))
        assert found[variant]["sampled"] == expected, variant
        lengths |= {len(answer) for answer in expected}
    assert len(lengths) > 8, "rows end at different times"


def test_sums_are_those_of_one_process(found, n_ranks, directory):
    for variant in RANKS[n_ranks]:
        for mine, wanted in zip(found[variant]["sums"], sums_of(load_whole(directory / variant)), strict=True):
            assert (mine - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_changes_of_a_table_reach_every_rank(found, directory, assert_close):
    exact = assert_close(found["changes"], changes_of, load_whole(directory / "llama"))
    for before, after in itertools.pairwise(exact):
        assert (before - after).abs().max() > 0.01


def test_what_else_is_asked_of_a_model(found, n_ranks, directory):
    whole = load_whole(directory / "llama")
    assert torch.equal(found["columns"], whole.down_columns(1, [0, 47, 23]))
    for site, states in mean_states(whole, prompts()).items():
        torch.testing.assert_close(found["states"][site], states, rtol=1e-4, atol=1e-5)
    assert found["cache bytes"][0] == whole.cache_bytes(2, 10) // n_ranks, "LOCAL_WORLD_SIZE is not set"
    torch.testing.assert_close(found["after"], whole(sequences()), rtol=1e-4, atol=1e-5)


def test_what_is_refused(found):
    assert found["table"].startswith("InputError: multiplier: ")
    assert found["relevance"].startswith(
        "InputError: engine: relp needs gradients: the model must be whole, in one proc"
    )
    assert found["batch"].startswith("InputError: batch: is not measured with a model that ranks share")
    assert found["device"] == "InputError: device: the ranks of this model run on cpu, got meta"
    assert found["too long"] == f"RanksFailed: p0: has 174 tokens, the model's context is {LONG}"
    assert found["ended"] == f"RanksFailed: ranks: take no more calls: {found['too long'][13:]}"


def test_other_ranks_keep_no_cache_that_rank_0_has_dropped(n_ranks, directory):
    for rank in range(1, n_ranks):
        alive = torch.load(directory / f"{n_ranks}-{rank}.pt")["alive"]
        assert len(alive) == 3 * len(ANSWERING) and max(alive) <= 1


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_a_rank_that_fails_ends_all_within_ten_seconds(name, culprit):
    words = ["run", "demo:instruct", "-p", "How do I open the vault?", "--tensor-parallel"]
    done = run_ranks(2, __file__, name, culprit, *words)
    for rank, (code, said, error) in enumerate(done):
        if name == "killed" and rank == culprit:
            assert (code, error) == (-signal.SIGKILL, "")
            continue
        assert float(said.split()[-1]) < 10
        if rank == 1 and name == "out of memory" and culprit == 0:
            assert (code, error) == (0, ""), "rank 0 has told the user"
            continue
        line = "out of memory; ask for fewer at once (--batch)" if rank == culprit else "has lost another rank: "
        assert error.startswith(f"cna run: rank {rank}: {line}") and (code, error.count("\n")) == (2, 1)


@pytest.mark.exhaustive
def test_bad_input_is_said_once(tmp_path, directory):
    words = ["run", "-p", "hi", "--tensor-parallel", "--max-new-tokens", "4"]
    (tmp_path / "bad.json").write_text(json.dumps({"schema_version": 1}))
    for model, more, line in (
        ("demo:instruct", ["-c", tmp_path / "bad.json"], f"{tmp_path}/bad.json: n_layers: "),
        ("demo:instruct", ["--device", "cuda:1"], "--device: every worker has a GPU of its own: "),
        ("nowhere", [], "nowhere"),
    ):
        done = run_ranks(2, "-m", "cna_kernels.model", *words[:1], model, *words[1:], *more)
        assert done[0][0] == 2 and done[0][1] == "" and done[0][2].startswith(f"cna run: {line}"), done
        if "--device" not in more:
            assert done[1] == (0, "", ""), done


if __name__ == "__main__":
    if len(sys.argv) == 2:
        run_rank(Path(sys.argv[1]))
    else:
        sys.exit(run_faulty(*sys.argv[1:3], sys.argv[3:]))
