"""The wheels: what they hold and require, and what works where packages, a compiler or POSIX are absent."""

import json
import os
import subprocess
import sys
import zipfile
from email import message_from_bytes

import build_wheel
import pytest

from cna_kernels import Circuit

pytestmark = pytest.mark.exhaustive  # builds the wheel with a compiler

PACKAGES = ("tokenizers", "jinja2", "rich", "matplotlib", "cna_kernels_demo", "pyarrow", "lm_eval")
NOT_EVERYWHERE = ("resource", "fcntl", "pwd", "grp", "termios")  # modules that Windows lacks
NOT_IN_OS = "sched_getaffinity fork getuid preadv pwritev posix_fallocate posix_fadvise sysconf sysconf_names".split()


def build(place, source=build_wheel.ROOT, **environment):
    pytest.importorskip("setuptools", minversion="77")
    return build_wheel.build(
        source, place, "--no-build-isolation", env={**os.environ, **environment}, capture_output=True
    )


def unpacked(path, place):
    with zipfile.ZipFile(path) as file:
        file.extractall(place)
    return place


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return build(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def site(engine, tmp_path_factory):
    """The directory where the wheel is unpacked, as pip would unpack it."""
    return unpacked(engine, tmp_path_factory.mktemp("site"))


def run(code, *words, paths, cwd, absent=PACKAGES):
    """Run Python code with the packages of ``paths``, and without the modules of ``absent``."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n{code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "always", "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


CNA = "from cna_kernels.model.cli import main\nsys.exit(main(sys.argv[1:]))"


def test_the_wheel_holds_what_it_must_and_is_small(engine):
    assert build_wheel.faults(engine) == []
    assert build_wheel.LARGEST["cna_kernels"] <= 1_500_000 and engine.name.startswith("cna_kernels-0.1.0-py3-none-")


def test_a_wheel_that_is_wrong_is_found(engine, tmp_path):
    with zipfile.ZipFile(engine) as old, zipfile.ZipFile(tmp_path / engine.name, "w") as new:
        for entry in old.namelist():
            if entry not in (build_wheel.LIBRARY, "cna_kernels/py.typed"):
                new.writestr(entry, old.read(entry))
        new.writestr("cna_kernels/model/demo/checkpoints/base/model.safetensors", os.urandom(1_500_000))
    found = build_wheel.faults(tmp_path / engine.name)
    assert found[:3] == [
        f"misses {build_wheel.LIBRARY}",
        "misses cna_kernels/py.typed",
        "holds cna_kernels/model/demo/checkpoints/base/model.safetensors, which is none of its files",
    ]
    assert len(found) == 4 and found[3].endswith("more than 1,500,000")


def test_what_the_wheel_requires(engine):
    with zipfile.ZipFile(engine) as file:
        (name,) = (entry for entry in file.namelist() if entry.endswith("/METADATA"))
        metadata = message_from_bytes(file.read(name))
    extras = {}
    for requirement in metadata.get_all("Requires-Dist"):
        package, _, marker = requirement.partition("; ")
        extra = marker.rpartition("extra == ")[2] if "extra == " in marker else ""
        extras.setdefault(extra.strip('"'), set()).add(package)
    assert extras[""] == {"torch>=2.10", "triton>=3.6", "numpy", "safetensors>=0.8"}
    assert 'triton>=3.6; platform_system == "Linux"' in metadata.get_all("Requires-Dist")
    assert extras["model"] == {"tokenizers>=0.22", "jinja2>=3.1", "rich>=13", "huggingface_hub>=0.30"}
    assert extras["plot"] == {"matplotlib>=3.8"}
    assert extras["demo"] == {"cna-kernels[gguf,model,plot]", "cna-kernels-demo==1"}
    assert extras["all"] == {"cna-kernels[datasets,demo,eval,hf,pandas,ray]"}


OPS = """
import torch
from cna_kernels import backends, gated_mlp, reference
x, gate_up, down = torch.randn(3, 16), torch.randn(64, 16), torch.randn(16, 32)
y = gated_mlp(x, gate_up, down)
assert torch.allclose(y, reference.gated_mlp(x, gate_up, down), atol=1e-4), y
print(backends.name_for("cpu"), __import__("cna_kernels").__file__)
"""


def test_ops_need_the_core_alone(site, tmp_path):
    done = run(OPS, paths=[site], cwd=tmp_path, absent=(*PACKAGES, *NOT_EVERYWHERE, "triton"))
    assert done.stdout.split() == ["cpu", str(site / "cna_kernels" / "__init__.py")], done.stderr


PLAIN, MODEL = ["--positive", "p.txt", "--negative", "p.txt"], str(build_wheel.DEMO / "instruct")
TO_DEMO = 'cna-kernels-demo: not installed: pip install "cna-kernels[demo]", in a checkout ".[demo]" '
TO_DEMO += "./model/demo/checkpoints"
REFUSED = {
    "discover": (["discover", MODEL, *PLAIN, "-o", "c.json"], "tokenizers, jinja2", "model"),
    "run": (["run", MODEL, "-p", "hi"], "tokenizers, jinja2", "model"),
    "export": (["export", MODEL, "-c", "c.json", "--to", "lora", "-o", "adapter"], "tokenizers, jinja2", "model"),
    "estimate": (["estimate", MODEL, "--prompts", "p.txt"], "tokenizers, jinja2", "model"),
    "sweep": (["sweep", MODEL, "-c", "c.json", "--harmful", "p.txt"], "tokenizers, jinja2", "model"),
    "eval": (["eval", MODEL, "-c", "c.json", "-o", "r"], "tokenizers, jinja2, matplotlib", "model,plot"),
    "compare": (["compare", MODEL, MODEL, *PLAIN, "-o", "r"], "tokenizers, jinja2, matplotlib", "model,plot"),
    "lm-eval": (["lm-eval", "--tasks", "mmlu"], "tokenizers, jinja2, lm_eval", "model,eval"),
    "demo": (["demo", "--bundled"], TO_DEMO, None),
    "run demo:instruct": (["run", "demo:instruct", "-p", "hi"], TO_DEMO, None),
}


CNA_FOR_EACH = """
import contextlib, io, json, os
from cna_kernels.model.cli import main
found = {}
for number, (case, words) in enumerate(json.loads(sys.argv[1]).items()):
    os.chdir(f"{sys.argv[2]}/{number}")
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        found[case] = main(words), errors.getvalue(), sorted(os.listdir())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refused(site, tmp_path_factory):
    """case -> the exit code, what stderr holds, the files afterwards. One process runs them all: it starts slowly."""
    place = tmp_path_factory.mktemp("refused")
    for number in range(len(REFUSED)):
        (place / str(number)).mkdir()
        (place / str(number) / "p.txt").write_text("a prompt\n")
        Circuit(((0, 3, 1.0),), 8, 1024).save(place / str(number) / "c.json")
    commands = json.dumps({case: words for case, (words, _, _) in REFUSED.items()})
    done = run(CNA_FOR_EACH, commands, place, paths=[site], cwd=place)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_is_one_line(case, refused):
    words, packages, extra = REFUSED[case]
    status, errors, files = refused[case]
    assert status == 2 and errors.count("\n") == 1, errors
    assert errors.startswith(f"cna {words[0]}: {packages}"), errors
    if extra:
        assert errors.endswith(f'not installed: pip install "cna-kernels[{extra}]", in a checkout ".[{extra}]"\n')
    assert files == ["c.json", "p.txt"]


def test_the_core_shows_circuits_and_says_what_is_missing(site, tmp_path):
    Circuit(((0, 3, 1.0), (1, 5, -0.5)), 2, 8).save(tmp_path / "c.json")
    shown = run(CNA, "show", "c.json", paths=[site], cwd=tmp_path)
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert shown.returncode == 0 and ["1", "0", "3", "+1.0000"] in rows and ["2", "1", "5", "-0.5000"] in rows
    doctor = run(CNA, "doctor", paths=[site], cwd=tmp_path)
    facts = dict(line.split(maxsplit=1) for line in doctor.stdout.splitlines())
    assert doctor.returncode == 0 and facts["torch"]
    assert facts["rich"] == 'not installed: pip install "cna-kernels[model]", in a checkout ".[model]"'
    assert facts["matplotlib"] == 'not installed: pip install "cna-kernels[plot]", in a checkout ".[plot]"'
    assert f"cna-kernels-demo: {facts['cna-kernels-demo']}" == TO_DEMO
    assert run(CNA, "--help", paths=[site], cwd=tmp_path).returncode == 0


IMPORT_ALL = """
import os, pkgutil, torch
sys.modules.update(dict.fromkeys({absent!r}))
for name in {names!r}:
    vars(os).pop(name, None)
import cna_kernels
modules = [m.name for m in pkgutil.walk_packages(cna_kernels.__path__, "cna_kernels.")]
for name in modules:
    if not name.endswith(("__main__", "libcna", "lm_eval_model")):
        __import__(name)
print(len(modules))
"""


@pytest.mark.parametrize("absent", [(), PACKAGES], ids=["all packages", "core alone"])
def test_every_module_loads_where_posix_is_absent(absent, site, tmp_path):
    code = IMPORT_ALL.format(absent=NOT_EVERYWHERE, names=NOT_IN_OS)
    done = run(code, paths=[site], cwd=tmp_path, absent=absent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 90


WITHOUT_POSIX = """
import asyncio  # which asks os.sysconf when it is imported
import os
for name in {names!r}:
    vars(os).pop(name, None)
import json, torch
from cna_kernels.model.cli import main
from cna_kernels.model.discovery import streamed
streamed.HIDDEN_BYTES = 0  # hidden states go through a file
sys.modules.update(dict.fromkeys({absent!r}))
sys.exit(main(sys.argv[1:]))
"""


def test_a_discovery_without_posix_and_rich(tmp_path, site):
    """With the fallbacks, streamed from the checkpoint and with progress in lines, the circuit is the same."""
    for name in ("p.txt", "n.txt"):
        (tmp_path / name).write_text("".join(f"{name} {word}\n" for word in "lamp door vault".split()))
    words = ["discover", MODEL, "--positive", "p.txt", "--negative", "n.txt", "--top-k", "5", "--stream-layers", "-o"]
    code = WITHOUT_POSIX.format(names=NOT_IN_OS, absent=NOT_EVERYWHERE)
    done = run(code, *words, "here.json", paths=[site], cwd=tmp_path, absent=("rich", *NOT_EVERYWHERE))
    plain = run(CNA, *words, "there.json", paths=[site], cwd=tmp_path, absent=())
    assert (done.returncode, plain.returncode) == (0, 0), done.stderr + plain.stderr
    here, there = (Circuit.load(tmp_path / name) for name in ("here.json", "there.json"))
    assert here.neurons == there.neurons and len(here.neurons) == 5
    lines = done.stderr.splitlines()
    assert any(" prompts: " in line and " tokens/s" in line for line in lines[:-2]), done.stderr
    assert "MiB" not in done.stderr and "MiB" in plain.stderr  # only the module resource tells the peak of memory


def test_without_a_compiler_pytorch_does_the_work(tmp_path):
    path = build(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert build_wheel.faults(path) == [f"misses {build_wheel.LIBRARY}"]
    place = unpacked(path, tmp_path / "site")
    done = run(OPS, paths=[place], cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.split()[0] == "reference", done.stderr
    assert done.stderr.count("Using PyTorch alone.") == 1 and "with a C++ compiler installed" in done.stderr
    doctor = run(CNA, "doctor", "--json", paths=[place], cwd=tmp_path)
    assert '"ops on cpu": "reference"' in doctor.stdout and "needs the compiled library" in doctor.stdout


def test_the_demo_is_a_wheel_of_its_own(site, tmp_path):
    path = build(tmp_path, build_wheel.DEMO)
    assert build_wheel.faults(path) == []
    place = unpacked(path, tmp_path / "demo")
    code = "from cna_kernels.model import demo_checkpoint\nprint(demo_checkpoint('base'))"
    found = run(code, paths=[site, place], cwd=tmp_path, absent=()).stdout.strip()
    assert found == str(place / "cna_kernels_demo" / "base")
    for part in (build_wheel.DEMO / "base").iterdir():
        assert (place / "cna_kernels_demo" / "base" / part.name).read_bytes() == part.read_bytes()
