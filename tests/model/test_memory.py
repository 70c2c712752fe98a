"""Devices and memory: what this machine has, what counts as a lack of memory, and halves down to one."""

import os

import pytest
import torch

from cna_kernels import InputError
from cna_kernels.model import LanguageModel, load, memory
from cna_kernels.model.cli import main
from cna_kernels.model.discovery.estimate import estimate
from cna_kernels.model.memory import DoesNotFit, default_device, in_halves, is_out_of_memory, memory_of, usable_device
from tiny import write_language_model


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="reads the memory from /proc")
def test_memory_of_the_machine():
    with open("/proc/meminfo") as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal"))
    assert memory_of("cpu") == pytest.approx(total, rel=0.01)
    assert memory_of("meta") is None


def test_what_is_a_lack_of_memory():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(DoesNotFit("a", "b"))
    assert not is_out_of_memory(RuntimeError("expected a tensor")) and not is_out_of_memory(InputError("a", "b"))


@pytest.mark.parametrize("fits", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), DoesNotFit("a", "b")])
def test_halves_until_it_fits(fits, error):
    sizes = []

    def run(items):
        if len(items) > fits:
            raise error
        sizes.append(len(items))
        return [item * item for item in items]

    assert in_halves(run, range(13), torch.device("cpu")) == [item * item for item in range(13)]
    assert sum(sizes) == 13 and max(sizes) <= fits


def test_one_that_does_not_fit_and_other_errors_are_raised():
    def fails(error):
        seen = []

        def run(items):
            seen.append(len(items))
            raise error

        with pytest.raises(type(error)):
            in_halves(run, range(4), torch.device("cpu"))
        return seen

    assert fails(torch.OutOfMemoryError("CUDA out of memory")) == [4, 2, 1]
    assert fails(RuntimeError("another")) == [4]


def test_devices():
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device: expected one of cpu, cuda, mps, xpu, got 'tpu'"):
        usable_device("tpu")
    with pytest.raises(InputError, match="device: cuda:63 cannot be used"):
        usable_device("cuda:63")


@pytest.mark.parametrize(
    ("gpus", "local_rank", "expected"),
    [(False, None, "cpu"), (False, "3", "cpu"), (True, None, "cuda:0"), (True, "0", "cuda:0"), (True, "3", "cuda:3")],
)
def test_the_default_device(monkeypatch, gpus, local_rank, expected):
    """A GPU where there is one, under torchrun each worker's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert default_device() == expected


def test_no_device_is_the_default_one(monkeypatch, tmp_path):
    """Of the commands, of Python, and of an estimate: each asks for it, and none for the CPU by itself."""
    path = write_language_model(tmp_path)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    monkeypatch.setattr(memory, "default_device", lambda: "cuda:63")
    calls = [
        lambda: usable_device(None), lambda: load(path), lambda: LanguageModel(path, stream_layers=True),
        lambda: estimate(path, [("a", "p")]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match="device: cuda:63 cannot be used"):
            call()
    assert main(["run", str(path), "-p", "a"]) == 2 == main(["estimate", str(path), "--prompts", f"{path}/prompts.txt"])
    assert usable_device("cpu") == load(path, device="cpu").device == torch.device("cpu")
