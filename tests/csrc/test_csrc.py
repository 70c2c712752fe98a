"""csrc/ builds alone, with every compiler that is here, with and without OpenMP; it installs; its examples pass."""

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import cna_kernels
from cna_kernels.cpu import library

CSRC = Path(__file__).resolve().parents[2] / "csrc"
EXAMPLES = CSRC.parent / "examples" / "c"
COMPILERS = {"gcc": ("gcc", "g++"), "clang": ("clang", "clang++")}
ARM = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++")


def run(*command, **environment):
    command = [str(part) for part in command]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


def make(build, *arguments, **environment):
    return run("make", "-s", "-j2", "-C", CSRC, f"BUILD={build}", "OPTIMIZE=-O0", *arguments, **environment)


def has_openmp(compiler, directory, *flags):
    source = directory / "openmp.cpp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    return run(compiler, "-fopenmp", *flags, source, "-o", directory / "openmp").returncode == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("openmp", [1, 0])
@pytest.mark.parametrize("name", COMPILERS)
def test_example(tmp_path, name, openmp):
    compilers = COMPILERS[name]
    if not all(map(shutil.which, (*compilers, "make"))):
        pytest.skip(f"{name} is not installed")
    if openmp and not has_openmp(compilers[1], tmp_path):
        pytest.skip(f"{name} has no OpenMP here")
    done = make(tmp_path, f"CC={compilers[0]}", f"CXX={compilers[1]}", f"OPENMP={openmp}", "example")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.rstrip().endswith("passed") and ("OpenMP" in done.stdout) == bool(openmp)
    for level in ("generic", "no such level"):
        again = run(tmp_path / "example", EXAMPLES / "example.f32", CNA_CPU_ISA=level)
        expected = (0, "generic, ") if level == "generic" else (1, "")
        assert (again.returncode, again.stdout[: len(expected[1])]) == expected, again.stderr


def test_example_on_arm(tmp_path):
    if not all(map(shutil.which, (*ARM, "qemu-aarch64", "make"))):
        pytest.skip("no cross compiler for 64-bit Arm, or no qemu-aarch64")
    done = make(tmp_path, f"CC={ARM[0]}", f"CXX={ARM[1]}", "LDFLAGS=-static", "RUN=qemu-aarch64", "example")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("neon, ") and done.stdout.rstrip().endswith("passed")


def test_example_data_is_what_the_definition_gives(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import example_data

    stored = torch.frombuffer(bytearray((EXAMPLES / "example.f32").read_bytes()), dtype=torch.float32)
    torch.testing.assert_close(stored, torch.cat([array.flatten() for array in example_data.arrays()]))


# What `make install` writes, and programs on it.


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The library and the two examples, built once by the default compilers."""
    if not all(map(shutil.which, ("cc", "c++", "make"))):
        pytest.skip("cc, c++ or make is not installed")
    build = tmp_path_factory.mktemp("build")
    done = make(build, "all", f"{build}/mlp_stack")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return build


@pytest.fixture
def prefix(build, tmp_path):
    prefix = tmp_path / "installed"
    done = make(build, "install", f"PREFIX={prefix}")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return prefix


def pkg_config(prefix, *arguments):
    if not shutil.which("pkg-config"):
        pytest.skip("pkg-config is not installed")
    done = run("pkg-config", *arguments, "cna", PKG_CONFIG_PATH=str(prefix / "lib" / "pkgconfig"))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def compile_and_run_example(directory, *flags, compiler=("cc", "-std=c99"), **environment):
    """Build example.c with these flags alone and run it; return what it prints."""
    program = directory / "program"
    done = run(*compiler, "-Wall", "-Wextra", "-pedantic", EXAMPLES / "example.c", "-o", program, *flags, "-lm")
    assert done.returncode == 0 and "example.c" not in done.stderr, done.stderr
    done = run(program, EXAMPLES / "example.f32", **environment)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("passed"), done.stderr
    return done.stdout


def names_in(path):
    """The SONAME and NEEDED entries of a shared object or a program, by readelf."""
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    return re.findall(r"\((SONAME|NEEDED)\).*\[(.*)\]", run("readelf", "-d", path).stdout)


@pytest.mark.parametrize("compiler", [("cc", "-std=c99"), ("c++", "-std=c++11", "-x", "c++")], ids=["c", "c++"])
def test_program_on_the_shared_library(prefix, tmp_path, compiler):
    flags = pkg_config(prefix, "--cflags", "--libs")
    if compiler[0] == "c++":
        flags = ["-x", "none", *flags]
    compile_and_run_example(tmp_path, *flags, compiler=compiler, LD_LIBRARY_PATH=str(prefix / "lib"))
    assert ("NEEDED", f"libcna.so.{library.ABI_VERSION}") in names_in(tmp_path / "program")


@pytest.mark.parametrize("how", ["static program", "static library"])
def test_program_on_the_static_library(prefix, tmp_path, how):
    flags = pkg_config(prefix, "--static", "--cflags", "--libs")
    if how == "static program":
        if not has_openmp("c++", tmp_path, "-static"):
            pytest.skip("the compiler's libraries are not here as archives")
        flags = ["-static", *flags]
    else:
        flags[flags.index("-lcna")] = str(prefix / "lib" / "libcna.a")
    compile_and_run_example(tmp_path, *flags)
    needed = names_in(tmp_path / "program")
    assert not any("libcna" in name for _, name in needed) and (how == "static library" or not needed)


def test_installed_library_has_a_versioned_name(prefix):
    versioned = f"libcna.so.{library.ABI_VERSION}"
    assert (prefix / "lib" / "libcna.so").readlink() == Path(versioned)
    assert ctypes.CDLL(str(prefix / "lib" / "libcna.so")).cna_abi_version() == library.ABI_VERSION
    assert ("SONAME", versioned) in names_in(prefix / "lib" / versioned)


def test_installed_directory_may_be_moved(prefix, tmp_path):
    assert pkg_config(prefix, "--modversion") == [cna_kernels.__version__]
    moved = prefix.rename(tmp_path / "moved")
    flags = pkg_config(moved, "--cflags", "--libs")
    assert str(prefix) not in (moved / "lib" / "pkgconfig" / "cna.pc").read_text()
    compile_and_run_example(tmp_path, *flags, LD_LIBRARY_PATH=str(moved / "lib"))


def test_uninstall_removes_what_install_wrote(build, tmp_path):
    arguments = ("PREFIX=/opt/with a blank", f"DESTDIR={tmp_path}")
    prefix = tmp_path / "opt" / "with a blank"
    assert make(build, "install", *arguments).returncode == 0
    written = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    libraries = {f"lib/libcna{end}" for end in (".a", ".so", f".so.{library.ABI_VERSION}")}
    assert written == {"include/cna.h", "lib/pkgconfig/cna.pc", *libraries}
    (prefix / "lib" / "other").touch()
    assert make(build, "uninstall", *arguments).returncode == 0
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [prefix / "lib" / "other"]


def test_install_on_macos_by_its_commands():
    """Checks the commands that make would run, since there is no Mac here."""
    done = run("make", "-n", "-C", CSRC, "SYSTEM=Darwin", "BUILD=/nowhere", "PREFIX=/opt/cna", "install")
    assert done.returncode == 0, done.stderr
    library_file = f"libcna.{library.ABI_VERSION}.dylib"
    for expected in (
        f"-Wl,-install_name,@rpath/{library_file}",
        f'install_name_tool -id "/opt/cna/lib/{library_file}" "/opt/cna/lib/{library_file}"',
        f'ln -sf {library_file} "/opt/cna/lib/libcna.dylib"',
        "-lc++ ",
    ):
        assert expected in done.stdout
    assert "gomp" not in done.stdout and ".so" not in done.stdout


# The library that the Python package holds.


def test_program_on_the_package(tmp_path):
    if reason := library.missing():
        pytest.skip(f"the CPU engine {reason}")
    done = run(sys.executable, "-m", "cna_kernels.cpu", "--cflags", "--libs")
    assert done.returncode == 0, done.stderr
    compile_and_run_example(tmp_path, *done.stdout.split())


@pytest.mark.exhaustive
def test_package_holds_the_header(tmp_path):
    done = run(sys.executable, "-c", FLAGS_WITHOUT_LIBRARY)
    assert done.returncode == 2 and "--libs: " in done.stderr and "missing" in done.stderr and not done.stdout
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build_py", "-d", tmp_path]
    done = subprocess.run(setup, cwd=CSRC.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "cna_kernels" / "cpu" / "cna.h"
    assert not copy.is_symlink() and copy.read_bytes() == (CSRC / "cna.h").read_bytes()


FLAGS_WITHOUT_LIBRARY = """
import sys
from pathlib import Path
from cna_kernels.cpu import library
library.PATH = Path("/nowhere/libcna.so")
sys.argv[1:] = ["--libs"]
from cna_kernels.cpu.__main__ import main
assert "torch" not in sys.modules
sys.exit(main())
"""


# mlp_stack.c


def weights(L, H, N, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (N, H), "up_proj": (N, H), "down_proj": (H, N)}
    return {
        f"model.layers.{layer}.mlp.{name}.weight": (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
        for layer in range(L)
        for name, shape in shapes.items()
    }


def stack(tensors, L, H, ablated=None):
    """What mlp_stack computes, in PyTorch and fp64: the last layer's x, and the means."""
    numbers = torch.arange(8 * H) * 2654435761 % 2**32 // 2**16
    x = (numbers.double() / 32768 - 1).view(8, H)
    means = []
    for layer in range(L):
        gate, up, down = (
            tensors[f"model.layers.{layer}.mlp.{name}.weight"].double()
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        act = F.silu(x @ gate.T) * (x @ up.T)
        means.append(act.mean(0))
        if ablated is not None:
            act[:, ablated[layer]] = 0
        x = x + act @ down.T
    return x, torch.stack(means)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "L, H, N, strong",
    [(3, 16, 48, None), (1, 1, 1, None), (1, 8, 2100, 1500), (1, 8, 2100, 2099)],  # a block has 1024 neurons
)
def test_mlp_stack(build, tmp_path, L, H, N, strong, dtype):
    tensors = weights(L, H, N, dtype)
    if strong is not None:
        gate, up = (tensors[f"model.layers.0.mlp.{name}.weight"] for name in ("gate_proj", "up_proj"))
        gate[strong] *= 10
        up[strong] = gate[strong]  # silu(g) * g is never negative
    others = {"model.norm.weight": torch.ones(H), "model.layers.0.self_attn.q_proj.weight": torch.ones(3, H)}
    save_file(tensors | others, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = run(build / "mlp_stack", tmp_path / "model.safetensors", tmp_path / "results.f32")
    assert done.returncode == 0 and not done.stderr, done.stderr

    plain, means = stack(tensors, L, H)
    strongest = means.argmax(1)
    steered, _ = stack(tensors, L, H, strongest)
    assert strong in (None, strongest[0])
    results = torch.frombuffer(bytearray((tmp_path / "results.f32").read_bytes()), dtype=torch.float32).double()
    results = results.split([8 * H, 8 * H, L * N])
    for got, exact in zip(results, (plain, steered, means), strict=True):
        assert (got.view_as(exact) - exact).abs().max() <= 1e-5 * exact.abs().max()

    changed = ((steered - plain).norm() / plain.norm()).item()
    assert changed > 1e-3  # a hundred times the tolerance
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [(int(row[0]), int(row[1])) for row in rows] == list(enumerate(strongest.tolist()))
    assert float(rows[-1][3]) == pytest.approx(changed, rel=1e-2)


def test_mlp_stack_refuses_bad_files(build, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    good = weights(2, 4, 6)

    def without(key):
        return {other: tensor for other, tensor in good.items() if other != key}

    def refused(what, content):
        path = tmp_path / "bad.safetensors"
        if isinstance(content, dict):
            save_file(content, path)
        elif content is not None:
            path.write_bytes(content)
        done = run(build / "mlp_stack", path, tmp_path / "results.f32")
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and not done.stdout and len(lines) == 1, (what, done)
        assert lines[0].startswith(f"{path}: ") and what in lines[0], lines
        assert not (tmp_path / "results.f32").exists()

    refused("No such file", None)
    for key in good:
        refused(f"{key}: is missing", without(key))
    refused("has no MLP weights", {"other": torch.ones(3)})
    refused(f"{name}: expected dtype F32 or BF16", good | {name: good[name].half()})
    refused(f"{name}: expected a dtype, a shape of two sizes", good | {name: good[name].flatten()})
    refused(f"{name}: shape does not fit", good | {name: torch.ones(6, 5)})
    refused(f"{name}: data_offsets and shape disagree", good | {name: torch.ones(6, 0)})

    save_file(good, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 7, 8, 9, header - 1):
        refused("not a safetensors file", whole[:length])
    for length in (header, len(whole) - 1):
        refused("lies outside the file", whole[:length])
    refused("not a safetensors file", b"\xff" * 8 + whole[8:])
    entry = re.compile(rb'(?<=1.mlp.up_proj.weight":{"dtype":"F32","shape":\[6,4\],"data_offsets":)\[\d+,\d+\]')
    for offsets in (b"[-96,0]", b"[96,0]", b"[0,95]", b"[0,99999999999999]", b"[0,9999999999999999]"):
        changed, n = entry.subn(offsets, whole[8:])
        assert n == 1
        refused(f"{name}: ", struct.pack("<Q", header + len(changed) - len(whole)) + changed)


def test_mlp_stack_says_when_results_cannot_be_written(build, tmp_path):
    save_file(weights(1, 4, 6), tmp_path / "model.safetensors")
    for path in (tmp_path / "no directory" / "results", "/dev/full"):
        if Path(path).parent.exists() and not Path(path).exists():
            continue  # no /dev/full
        done = run(build / "mlp_stack", tmp_path / "model.safetensors", path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(path) in done.stderr
    done = run(build / "mlp_stack", tmp_path / "model.safetensors", CNA_CPU_ISA="no such level")
    assert done.returncode == 1 and done.stderr.startswith("mlp_stack: the instruction-set level")
