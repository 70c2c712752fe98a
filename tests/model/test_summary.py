"""repr(model): one line from what is in memory, whatever the model's kind and state."""

import builtins

import pytest
import torch
import torch.distributed as dist

from cna_kernels.model import LanguageModel, load
from cna_kernels.model.parallel import tensor_parallel
from cna_kernels.model.summary import _count
from tiny import write_language_model

pytest.importorskip("transformers")
NAME = "LanguageModel('{}', {}, 3 layers x 48 neurons, "


@pytest.fixture
def no_files(monkeypatch):
    """Once called, opening a file fails."""

    def close():
        def fail(*_, **__):
            raise AssertionError("a file is read")

        monkeypatch.setattr(builtins, "open", fail)
        monkeypatch.setattr("os.open", fail)
        monkeypatch.setattr("os.stat", fail)

    return close


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_model_in_a_line(tmp_path, no_files, variant):
    model = load(write_language_model(tmp_path / variant, variant), dtype="bfloat16", device="cpu")
    begins = NAME.format(variant, variant)
    streamed = load(model.directory, stream_layers=True, device="cpu")
    no_files()
    shown, n = repr(model), model.transformer.n_weights()
    assert shown == str(model) == f"{begins}{_count(n)} weights, bfloat16 on cpu)" and 10_000 < n < 1_000_000
    assert repr(streamed) == f"{begins}{_count(n)} weights, float32 on cpu, layers streamed from the checkpoint)"


def test_a_model_shared_by_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = load(write_language_model(tmp_path), device="cpu", mesh=tensor_parallel.open_mesh("cpu"))
        assert repr(model).endswith("float32 on cpu, layers shared by 1 ranks)")
    finally:
        dist.destroy_process_group()
    assert repr(model).endswith("layers shared by 1 ranks)"), "when the group is gone, too"


def test_a_model_whose_matrices_lie_in_blocks(tmp_path):
    pytest.importorskip("gguf")
    from gguf_files import tiny_model, write_gguf

    model = load(write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind="Q8_0"), device="cpu")
    assert ("blocks" in repr(model)) == any(True for _ in model.transformer.block_weights())
    assert repr(model).startswith("LanguageModel('tiny.gguf', llama, ")


def test_a_model_that_is_not_loaded_has_a_line_too():
    assert repr(LanguageModel.__new__(LanguageModel)) == "LanguageModel(not loaded)"


def test_a_directory_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_language_model(tmp_path))
    assert repr(load(".", device="cpu", dtype=torch.float16)).startswith(NAME.format(".", "llama"))


@pytest.mark.parametrize(
    ("n", "shown"),
    [
        (999, "999"), (1000, "1.0K"), (999_949, "999.9K"), (999_950, "1.0M"), (134_515_008, "134.5M"),
        (8_030_261_248, "8.0B"), (1_500_000_000_000, "1500.0B"),
    ],
)  # fmt: skip
def test_numbers_of_weights(n, shown):
    assert _count(n) == shown
