"""One model on several ranks: the sums of one process, a share of the weights, and errors that all ranks raise.

Run by pytest, this file starts itself as 2 and as 4 processes. These do all the work once and write their results;
the tests read the results.
"""

import random
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch
from safetensors.torch import load_file, save_file

from cna_kernels import ActivationSums, InputError
from cna_kernels.model.checkpoint.config import read_config
from cna_kernels.model.checkpoint.load import load_transformer
from cna_kernels.model.checkpoint.safetensors_file import open_checkpoint
from cna_kernels.model.discovery import collect
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.discovery.units import Pass, run_unit
from cna_kernels.model.parallel import tensor_parallel
from cna_kernels.model.prompts.columns import Columns
from cna_kernels.model.prompts.corpus import Contrast, Corpus, Names, two_sets
from rank_processes import run_ranks
from tiny import VARIANTS, write_checkpoint

# number of ranks -> the variants that run on them
RANKS = {2: tuple(VARIANTS), 4: ("llama", "llama-bias", "mistral", "qwen2", "qwen3")}
HEADS = dict(num_attention_heads=8, num_key_value_heads=4)
# a layer has 12.9 MB, nearly all of it in tensors that ranks divide
LARGE = dict(hidden_size=256, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8)
N_LAYERS, N_NEURONS, N_PROMPTS, N_COLUMNS = 3, 48, 30, 4
CULPRIT, POISON = 17, 96  # a prompt, and a token that only it holds
PLACES = [f"p{row}" for row in range(N_PROMPTS)]


def prompts():
    """Prompts of 1 to 20 tokens after a common header; the last 1 to 3 tokens count."""
    draw = random.Random(0)
    ids = [[*range(5, 17), *(draw.randrange(3, 90) for _ in range(draw.randint(1, 20)))] for _ in PLACES]
    ids[CULPRIT][-2:] = [7, POISON]
    return [TokenPrompt(row, place, 1 + len(row) % 3) for row, place in zip(ids, PLACES, strict=True)]


def weights():
    return torch.rand(N_PROMPTS, N_COLUMNS, generator=torch.Generator().manual_seed(1))


def sums_of(transformer, **options):
    sums = ActivationSums(N_LAYERS, N_NEURONS, N_COLUMNS, squares=True)
    sums.total += 1.0  # sums from before the call must stay
    collect.collect(transformer, prompts(), weights(), sums, **({"max_tokens": 50} | options))
    return {"total": sums.total - 1, "total_sq": sums.total_sq, "count": sums.count}


def slots_of(transformer):
    """The sums of a unit with two columns, folds and replicates, and three universal prompts."""
    columns = Columns(2, (Contrast("circuit", 0, 1),), folds=2, bootstrap=3)
    texts, names = [(place, place) for place in PLACES], Names()
    with TemporaryFile() as file:
        entries = Corpus(file, two_sets(names, texts[:14], texts[14:-3], texts[-3:]), names).read(0)
    part = run_unit(transformer, entries, prompts(), 0, Pass(columns, squares=True))
    totals = torch.stack([part.slots[slot].total for slot in sorted(part.slots)])
    return {"totals": totals, "universal": part.universal, "n_universal": part.n_universal}


# What one rank does.


def run_rank(directory: Path):
    mesh = tensor_parallel.open_mesh("cpu", timeout=timedelta(seconds=20))
    rank, n_ranks = mesh.get_local_rank(), mesh.size()
    found = {"own shapes": [], "variants": {}}
    add_to = tensor_parallel.OwnSums.add_to

    def noted(self, whole):
        found["own shapes"].append(list(self.act_sum.shape))
        add_to(self, whole)

    tensor_parallel.OwnSums.add_to = noted
    for variant in RANKS[n_ranks]:
        transformer = load_part(directory / variant, mesh)
        layers = {f"layers.{name}": x for name, x in transformer.layers.named_parameters()}
        found["variants"][variant] = {
            "sums": sums_of(transformer),
            "shapes": {name: list(x.shape) for name, x in layers.items()},
            "bytes": sum(x.untyped_storage().nbytes() for x in layers.values()),
        }
    llama = load_part(directory / "llama", mesh)
    found["batch"] = sums_of(llama, batch=1)
    found["slots"] = slots_of(llama)
    found["bfloat16"] = sums_of(load_part(directory / "qwen3", mesh, dtype=torch.bfloat16))
    found["nan"] = message(lambda: sums_of(load_part(directory / "nan", mesh)))
    for field, changes in INDIVISIBLE.items():
        config = replace(read_config(directory / "llama"), **changes)
        found[field] = message(lambda config=config: tensor_parallel.load_parallel("nowhere", config, None, mesh=mesh))
    found["other checkpoint"] = message(lambda: load_part(directory / ("seed" if rank else "llama"), mesh))
    found["missing"] = message(lambda: load_part(directory / ("missing" if rank else "llama"), mesh))
    found["other prompts"] = message(lambda: sums_of(llama, batch=1 + rank))
    if sys.platform == "linux":
        found["large"] = load_large(directory / "large", mesh)

    whole = collect.forward

    def infinite_on_the_last_rank(transformer, packed, past, sums, **options):
        after = whole(transformer, packed, past, sums, **options)
        if rank == n_ranks - 1 and POISON in packed.ids and sum(span.n_prompts for span in packed.spans) > tolerated:
            sums.act_sum[1, 0, 5] = torch.inf
            found["times infinite"] = found.get("times infinite", 0) + 1
        return after

    collect.forward = infinite_on_the_last_rank
    tolerated = 1
    found["infinite in a pack"] = sums_of(llama, batch=8)
    tolerated = 0
    found["infinite"] = message(lambda: sums_of(llama))

    def out_of_memory_on_the_last_rank(transformer, packed, past, sums, **options):
        if rank == n_ranks - 1 and past is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(transformer, packed, past, sums, **options)

    collect.forward = out_of_memory_on_the_last_rank
    found["out of memory"] = message(lambda: sums_of(llama))  # the other ranks notice when this rank's process ends
    torch.save(found, directory / f"{n_ranks}-{rank}.pt")


INDIVISIBLE = {
    "num_attention_heads": dict(num_attention_heads=9, num_key_value_heads=9),
    "num_key_value_heads": dict(num_key_value_heads=1),
    "intermediate_size": dict(intermediate_size=N_NEURONS - 1),
}


def load_part(directory, mesh, **options):
    return tensor_parallel.load_parallel(
        directory, read_config(directory), open_checkpoint(directory), mesh=mesh, **options
    )


def message(call):
    try:
        call()
    except InputError as error:
        return str(error)
    return "no error"


def load_large(directory, mesh):
    """How many bytes loading a rank's part takes: of memory at the peak, and read from the file."""
    config, checkpoint = read_config(directory), open_checkpoint(directory)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = usage()
    tensor_parallel._load(directory, config, checkpoint, mesh, torch.float32, "cpu")
    return {name: after - before[name] for name, after in usage().items()}


def usage():
    status, io = Path("/proc/self/status").read_text(), Path("/proc/self/io").read_text()
    fields = dict(line.split(":") for line in (status + io).splitlines())
    return {"peak": int(fields["VmHWM"].split()[0]) * 1024, "read": int(fields["rchar"])}


# Tests of the ranks' results.


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint of every variant, and some that ranks must refuse."""
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("checkpoints")
    for variant in VARIANTS:
        write_checkpoint(variant, directory / variant, **HEADS)
    write_checkpoint("llama", directory / "seed", seed=3, **HEADS)
    write_checkpoint("llama", directory / "large", **LARGE)
    for name in ("nan", "missing"):
        write_checkpoint("llama", directory / name, **HEADS)
        tensors = load_file(directory / name / "model.safetensors")
        if name == "nan":
            tensors["model.embed_tokens.weight"][POISON] = torch.nan
        else:
            del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, directory / name / "model.safetensors")
    return directory


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.rare)])
def ranks(request, directory):
    """What every rank has found."""
    n_ranks = request.param
    done = run_ranks(n_ranks, __file__, directory)
    assert [code for code, *_ in done] == [0] * n_ranks, "\n".join(error for *_, error in done)
    return [torch.load(directory / f"{n_ranks}-{rank}.pt") for rank in range(n_ranks)]


def load_whole(directory, **options):
    return load_transformer(directory, read_config(directory), open_checkpoint(directory), **options)


def assert_close(found, expected, what=""):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), what


def test_sums_are_those_of_one_process(ranks, directory):
    for variant in RANKS[len(ranks)]:
        expected = sums_of(load_whole(directory / variant))
        top = expected["total"][:, 0].abs().flatten().topk(20).indices.tolist()
        for found in ranks:
            sums = found["variants"][variant]["sums"]
            for name in expected:
                assert_close(sums[name], expected[name], variant)
                assert torch.equal(sums[name], ranks[0]["variants"][variant]["sums"][name]), "the same bits everywhere"
            assert sums["total"][:, 0].abs().flatten().topk(20).indices.tolist() == top, variant


def test_ranks_share_the_layers(ranks, directory):
    replicated = ("layernorm.weight", "_norm.weight", "o_proj.bias", "down_proj.bias")
    for variant in RANKS[len(ranks)]:
        whole = {name: x.numel() for name, x in load_whole(directory / variant).named_parameters()}
        for found in ranks:
            shapes = found["variants"][variant]["shapes"]
            assert set(shapes) == {name for name in whole if name.startswith("layers.")}
            numel = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
            for name, own in numel.items():
                assert own * (1 if name.endswith(replicated) else len(ranks)) == whole[name], f"{variant}: {name}"
            assert found["variants"][variant]["bytes"] == 4 * sum(numel.values()), "and nothing else is kept alive"


def test_each_rank_keeps_the_sums_of_its_own_neurons(ranks):
    n = len(RANKS[len(ranks)])
    for found in ranks:
        assert found["own shapes"][:n] == [[N_LAYERS, N_COLUMNS, N_NEURONS // len(ranks)]] * n


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_reads_and_holds_its_part_only(ranks, directory):
    n_bytes = (directory / "large" / "model.safetensors").stat().st_size
    tensor = 4 * LARGE["hidden_size"] * LARGE["intermediate_size"]
    for found in ranks:
        assert found["large"]["read"] < n_bytes / len(ranks) + 1e6
        assert found["large"]["peak"] < n_bytes / len(ranks) + tensor + 4e6


def test_any_packs_and_whole_units(ranks, directory):
    llama = load_whole(directory / "llama")
    expected = sums_of(llama), slots_of(llama)
    for found in ranks:
        assert_close(found["batch"]["total"], expected[0]["total"])
        assert_close(found["slots"]["totals"], expected[1]["totals"])
        assert torch.equal(found["slots"]["universal"], expected[1]["universal"])
        assert found["slots"]["n_universal"] == 3


def test_bfloat16(ranks, directory):
    """Each rank rounds its summand, so ranks may have twice the rounding error of one process."""
    exact = sums_of(load_whole(directory / "qwen3"))["total"]
    single = sums_of(load_whole(directory / "qwen3", dtype=torch.bfloat16))["total"]
    for found in ranks:
        assert (found["bfloat16"]["total"] - exact).norm() <= 2 * (single - exact).norm()


def test_a_non_finite_activation_names_the_prompt_on_all_ranks(ranks):
    own = N_NEURONS // len(ranks)
    for found in ranks:
        assert found["nan"] == f"p{CULPRIT}: causes a non-finite activation in layer 0, neuron 0; nothing was selected"
        index = (len(ranks) - 1) * own + 5
        assert found["infinite"].startswith(f"p{CULPRIT}: causes a non-finite activation in layer 1, neuron {index};")


def test_sums_that_overflow_for_a_whole_pack_are_added_in_halves_by_all_ranks(ranks, directory):
    expected = sums_of(load_whole(directory / "llama"), batch=8)
    for found in ranks:
        assert_close(found["infinite in a pack"]["total"], expected["total"])
        assert_close(found["infinite in a pack"]["count"], expected["count"])
    assert ranks[-1]["times infinite"] >= 4, "the pack of 8, of 4, of 2, and the last test's"


def test_what_cannot_be_shared_out_is_refused_before_anything_is_read(ranks):
    for found in ranks:
        for field, changes in INDIVISIBLE.items():
            what = f"expected a multiple of the {len(ranks)} ranks, got {changes[field]}"
            assert found[field] == f"nowhere/config.json: {field}: {what}"


def test_ranks_that_differ_are_told_so(ranks):
    for rank, found in enumerate(ranks):
        assert found["other checkpoint"] == "rank 1: has another checkpoint than rank 0"
        assert found["other prompts"] == "rank 1: has another list of prompts than rank 0"
        own = "'model.layers.1.mlp.up_proj.weight': is missing from the checkpoint"
        assert own in found["missing"] if rank else found["missing"].startswith("rank 1: has failed")


def test_out_of_memory_of_one_rank_ends_all(ranks):
    last = len(ranks) - 1
    for rank, found in enumerate(ranks):
        expected = f"out of memory on rank {last} with these" if rank == last else f"rank {rank}: has lost another rank"
        assert expected in found["out of memory"]


def test_the_mesh_is_torchruns(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="RANK: is not set: tensor parallelism is started with torchrun"):
        tensor_parallel.open_mesh("cpu")
    with pytest.raises(InputError, match="device: tensor parallelism runs on cpu and cuda, got mps"):
        tensor_parallel.open_mesh("mps")


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
