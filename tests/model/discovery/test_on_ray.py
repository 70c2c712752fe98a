"""--ray: any number of workers, killed at any time, give the bytes of one process; bad input gives one line."""

import os
import pickle
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from cna_kernels import InputError
from cna_kernels.model.cli import main
from kill_workers import command, hashes, run_with_kills, write_files

pytest.importorskip("transformers")
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(files):
    """The hashes of a run by one process, without Ray."""
    pytest.importorskip("ray", reason="needs the package ray")
    subprocess.run(command(files, files / "one.json", files / "one"), check=True, capture_output=True)
    return hashes(files / "one.json", files / "one")


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """(address, environment) of a Ray of four CPUs, which ends with the tests."""
    pytest.importorskip("ray", reason="needs the package ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    words += ["--num-cpus=4", "--num-gpus=0", "--include-dashboard=false", "--disable-usage-stats"]
    with open(tmp_path_factory.mktemp("ray") / "log", "w+") as log:
        head = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (tmp := (log.seek(0), log.read())[1]):
            assert head.poll() is None and time.monotonic() < deadline, tmp
            time.sleep(0.2)
        yield f"127.0.0.1:{port}", environment
        head.send_signal(signal.SIGTERM)
        head.wait(30)


def on(ray, files, out, run, *more):
    return subprocess.run(
        command(files, out, run, "--ray", ray[0], *more), env=ray[1], capture_output=True, text=True, timeout=100
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [2, 4])  # the tests below have 1 worker
def test_any_number_of_workers(files, expected, ray, tmp_path, workers):
    done = on(ray, files, tmp_path / "c.json", tmp_path / "run", "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "c.json", tmp_path / "run") == expected
    assert "4,000 prompts in" in done.stderr and done.stdout.count("top neurons") == 1


@pytest.mark.exhaustive
def test_a_run_that_one_process_began(files, expected, ray, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(files / "one", run)
    parts = sorted((run / "parts").iterdir())
    before = {part: part.stat().st_mtime_ns for part in parts[2:]}
    for part in parts[:2]:
        part.unlink()
    assert on(ray, files, tmp_path / "c.json", run, "--workers", 1).returncode == 0
    assert hashes(tmp_path / "c.json", run) == expected
    assert {part: part.stat().st_mtime_ns for part in parts[2:]} == before, "only what is missing runs"
    done = on(ray, files, tmp_path / "d.json", run, "--workers", 1, "--dtype", "bfloat16")
    assert done.returncode == 2 and not (tmp_path / "d.json").exists()
    last = done.stderr.splitlines()[-1]
    assert last.endswith("manifest.json: dtype: belongs to another run: it has 'float32', this one 'bfloat16'")


@pytest.mark.exhaustive
def test_a_worker_that_is_killed_again_and_again(files, expected, tmp_path):
    """One worker of a local Ray. `python tests/kill_workers.py` kills workers of several."""
    pytest.importorskip("ray", reason="needs the package ray")
    words = command(files, tmp_path / "c.json", tmp_path / "run", "--ray", "local", "--workers", 1)
    killed, _ = run_with_kills(words, tmp_path / "run", 3, random.Random(0))
    assert killed == 3 and hashes(tmp_path / "c.json", tmp_path / "run") == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--workers: is needed where no GPUs are: every worker loads the model"),
        (["--workers", 5], "--workers: this Ray has room for 4: 4 CPUs, 0 GPUs"),
        (["--workers", 1, "--negative", "long.txt"], "long.txt:2: has 1001 tokens, the model's context is 64"),
    ],
    ids=["no number of workers", "too many", "a prompt that is too long"],
)
def test_what_this_ray_cannot_do(files, ray, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text("short\n" + "a" * 1000)
    done = on(ray, files, tmp_path / "c.json", tmp_path / "run", *more)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ray", "127.0.0.1:9"], "--ray: expected local, or HOST:PORT of a Ray, got '127.0.0.1:9'"),
        (["--ray", "nowhere"], "--ray: expected local, or HOST:PORT of a Ray, got 'nowhere'"),
        (["--ray", "local", "--batch", "auto"], "--batch: auto measures a model of this process"),
        (
            ["--ray", "local", "--device", "cuda:1"],
            "--device: with --ray, which hands the devices out, expected cpu or",
        ),
        (["--workers", "2"], "--workers: is for --ray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be(files, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    if "127.0.0.1:9" in more or "nowhere" in more:
        pytest.importorskip("ray", reason="needs the package ray")
    assert main([*command(files, tmp_path / "c.json", tmp_path / "run")[3:], *more]) == 2
    assert message in capsys.readouterr().err


def test_ray_needs_a_run_directory(files, tmp_path, capsys):
    words = command(files, tmp_path / "c.json", tmp_path / "run", "--ray", "local")[3:]
    del words[words.index("--run-dir") : words.index("--run-dir") + 2]
    assert main(words) == 2
    assert "--ray: needs a run directory that all workers see, and no torchrun" in capsys.readouterr().err


def test_without_the_package(files, tmp_path, capsys, monkeypatch):
    for name in AUTH:
        monkeypatch.setenv(name, "0")  # so that monkeypatch restores what the command sets
    monkeypatch.setitem(sys.modules, "ray", None)
    words = command(files, tmp_path / "c.json", tmp_path / "run", "--ray", "local", "--workers", 1)[3:]
    assert main(words) == 2
    assert 'ray: not installed: pip install "cna-kernels[ray]", in a checkout ".[ray]"' in capsys.readouterr().err


def test_ray_is_imported_for_ray_alone():
    code = (
        "import sys, cna_kernels.model.cli.attribution, cna_kernels.model.discovery.on_ray; print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_error_crosses_to_another_process():
    error = pickle.loads(pickle.dumps(InputError("file: field", "is wrong")))
    assert (type(error), error.where, error.what) == (InputError, "file: field", "is wrong")
