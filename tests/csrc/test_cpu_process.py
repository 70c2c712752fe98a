"""The CPU engine as part of a process: other processes, threads, libraries, instruction sets and memory."""

import os
import subprocess
import sys

import pytest
import torch

from cna_kernels import ops
from cna_kernels.cpu import library
from op_cases import make_case

if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)


def python(code, **environment):
    """Run code in a fresh interpreter."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment)


def test_fork_after_a_parallel_region():
    code = """
import os, signal, torch
torch.set_num_threads(2)
from cna_kernels import ops
x, w, d = torch.randn(64, 256), torch.randn(1024, 256), torch.randn(256, 512)
before = ops.gated_mlp(x, w, d, backend="cpu")
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that waits for its parent's threads is killed
    os._exit(0 if torch.equal(ops.gated_mlp(x, w, d, backend="cpu"), before) else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(ops.gated_mlp(x, w, d, backend="cpu"), before)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["torch", "library"])
def test_import_before_and_after_torch(first):
    """In either order the process has one OpenMP, so that torch.set_num_threads governs both libraries."""
    code = f"""
import ctypes, importlib.util, pathlib
def use_library():
    package = pathlib.Path(importlib.util.find_spec("cna_kernels").origin).parent
    from cna_kernels.cpu import library
    x, y = (ctypes.c_float * 4096)(*[1.0] * 4096), (ctypes.c_float * 64)()
    address = ctypes.addressof
    status = library.load().cna_linear_fp32(address(y), address(x), address(x), None, 1, 64, 64, 64, 64, 64, 2)
    assert status == 0 and list(y) == [64.0] * 64
def use_torch():
    import torch
    assert torch.ones(2000, 2000).sum() == 4e6
    return torch
if {first!r} == "library":
    use_library()
    import sys
    assert "torch" not in sys.modules
torch = use_torch()
use_library()
from cna_kernels import ops
assert torch.equal(ops.linear(torch.ones(3, 5), torch.ones(2, 5), backend="cpu"), torch.full((3, 2), 5.0))
maps = pathlib.Path("/proc/self/maps")
found = {{line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line.split()[-1].rsplit("/")[-1]}}
assert len(found) <= 1, found
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_threads_compute_in_the_callers_floating_point_mode():
    code = """
import torch
from cna_kernels import ops
x, w = torch.full((4, 64), 1e-39), torch.eye(64).repeat(64, 1)
torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # starts the threads before the mode changes
assert torch.set_flush_denormal(True)
assert not ops.linear(x, w, backend="cpu").any()
torch.set_flush_denormal(False)
assert (ops.linear(x, w, backend="cpu") > 0).all()
"""
    done = python(code, CNA_CPU_ISA="generic", CNA_PLAN="linear=csrc")
    assert done.returncode == 0, done.stderr


def test_calls_leave_the_process_as_it_was():
    code = """
import os, random, signal, torch
from cna_kernels import ops
denormal = torch.tensor([1e-40])
def state():
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_rng_state().sum(),
            random.getstate(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGILL)],
            dict(os.environ), (denormal * 0.5 > 0).item(), torch.seed() and 0)
x, w, d = torch.randn(64, 256), torch.randn(1024, 256), torch.randn(256, 512)
torch.manual_seed(0); before = state()
torch.manual_seed(0); ops.gated_mlp(x, w, d, backend="cpu"); after = state()
assert before == after, (before, after)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_an_instruction_set_that_is_not_there_is_refused():
    for name in ("sse9", "neon" if "avx2" in library.levels() else "avx512"):
        done = python(
            "from cna_kernels.model.cli import main; exit(main(['run', 'demo:instruct', '-p', 'hi']))", CNA_CPU_ISA=name
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"CNA_CPU_ISA: the CPU engine cannot use CNA_CPU_ISA='{name}': this CPU has generic" in done.stderr
        with pytest.raises(ValueError, match=f"isa: expected one of generic.*, got '{name}'"):
            library.use_isa(name)
    done = python("from cna_kernels.cpu import library; print(library.isa())", CNA_CPU_ISA="generic")
    assert done.stdout == "generic\n"


def test_a_library_that_is_missing_or_wrong_says_how_to_build_it(monkeypatch, tmp_path):
    advice = "with a C++ compiler installed, run 'pip install .'"
    for name, text in (("missing.so", None), ("text.so", "no library"), ("other.so", "int other;"), ("old.so", None)):
        path = tmp_path / name
        if name in ("other.so", "old.so"):
            source = text or "int cna_abi_version(void) { return 99; }"
            (tmp_path / "source.c").write_text(source)
            subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "source.c"), "-o", str(path)], check=True)
        elif text:
            path.write_text(text)
        with pytest.raises(library.LibraryError) as caught:
            library.open_library(path)
        assert name in str(caught.value) and advice in str(caught.value)
    assert f"ABI version 99, expected {library.ABI_VERSION}" in str(caught.value)

    monkeypatch.setattr(library, "missing", lambda: "needs the compiled library")
    case = make_case(3, 8, torch.float32)
    with pytest.warns(UserWarning, match="the CPU engine needs the compiled library. Using PyTorch alone"):
        ops.swiglu(case.gate, case.up)
    with pytest.raises(ValueError, match="backend: 'cpu' needs the compiled library; use 'reference'"):
        ops.swiglu(case.gate, case.up, backend="cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_no_copy_of_the_weights():
    """A call on an MLP of 100 MB needs at most 16 MB for packing, activations and its result."""
    code = """
import re, torch
from cna_kernels import ops
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
w_gate_up, w_down = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((16384, 2048), (2048, 8192)))
x = torch.ones(256, 2048, dtype=torch.bfloat16)
ops.gated_mlp(x[:1, :64], w_gate_up[:128, :64], w_down[:64, :64], backend="cpu")
before = peak()
for n_tokens in (1, 16, 256):
    ops.gated_mlp(x[:n_tokens], w_gate_up, w_down, backend="cpu")
print(peak() - before)
"""
    done = python(code, CNA_PLAN="gated_mlp=csrc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 16 << 20, f"{int(done.stdout) / 2**20:.1f} MiB"


def test_a_large_workspace_is_given_back():
    """After a large call, and many small ones, the thread keeps no more scratch memory than the small ones need."""
    code = """
import os, torch
torch.set_num_threads(1)
from cna_kernels import ops
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20
act, w = torch.ones(256, 120_000), torch.ones(4, 120_000)  # 120 MB of tokens, prepared for the product
small = act[:8, :64].clone(), w[:, :64].clone()
ops.down_proj(*small, backend="cpu")
before = resident()
ops.down_proj(act, w, backend="cpu")
large = resident() - before
for _ in range(4200):
    ops.down_proj(*small, backend="cpu")
after = resident() - before
assert large > 100 and after < 20, (large, after)
"""
    if not os.path.exists("/proc/self/statm") or "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("no /proc here, or AddressSanitizer keeps freed memory")
    done = python(code)
    assert done.returncode == 0, done.stderr
