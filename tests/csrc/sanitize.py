"""Run the CPU tests on a library with AddressSanitizer and UndefinedBehaviorSanitizer, then plant nine bugs.

    python tests/csrc/sanitize.py [--quick]

The package is copied, and the copy gets the sanitized library. The sanitizers must report nothing while the tests run
without a bug, and each planted bug must be reported in its test, wrong numbers by the test; otherwise the exit code
is 1. --quick: one feature of eight, no bug.
Linux with gcc.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
SUITE = (
    *(f"tests/csrc/test_{name}.py" for name in ("cpu", "cpu_process", "c_api", "blocks", "typed_api")),
    "tests/model/test_decode.py",
)
REPORTS = ("ERROR: AddressSanitizer", "runtime error:")


class Bug(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    test: str  # pytest -k
    report: str


BUGS = [
    Bug(
        "the rest of a row read as a whole piece",
        "dot.h",
        "std::memcpy(rest, w + r * w_stride + k, (K - k) * sizeof(T));",
        "std::memcpy(rest, w + r * w_stride + k, sizeof rest);",
        "test_values and down_proj and 16x136x200 and plain and bfloat16",
        "AddressSanitizer",  # the report has no fixed name for a read across the end
    ),
    Bug(
        "the rest of a row stored as a whole vector",
        "act.h",
        "  std::memcpy(p, some, n * sizeof(T));",
        "  std::memcpy(p, some, sizeof some);",
        "test_values and swiglu and 63x130x72 and plain and bfloat16",
        "heap-buffer-overflow",
    ),
    Bug(
        "workspace used after it was freed",
        "workspace.cpp",
        "  if (bytes > buffer.bytes || buffer.small_calls > PATIENCE) {",
        "  if (bytes <= buffer.bytes) std::free(buffer.at);\n  if (bytes > buffer.bytes) {",
        "test_values and down_proj and 16x136x200 and float32 and sums",
        "AddressSanitizer",
    ),
    Bug(
        "a stride that means nothing multiplied",
        "api.cpp",
        "if (rows < 2 || columns == 0) stride = columns;",
        "if (rows < 2) stride = columns;",
        "test_strides_of_arrays_without_columns and linear and fp32",
        "runtime error",
    ),
    Bug(
        "units stored behind their part of the workspace",
        "panel.h",
        "(n_units - unit) * width >= W ? W : width",
        "unit + 1 < n_units ? W : width",
        "test_values and down_proj and 6x32x40 and float32 and plain",
        "AddressSanitizer",
    ),
    Bug(
        "low and high halves exchanged",
        "blocks.h",
        "q[i] = int8_t((bytes[i] & 15) - zero);\n    q[16 + i] = int8_t((bytes[i] >> 4) - zero);",
        "q[i] = int8_t((bytes[i] >> 4) - zero);\n    q[16 + i] = int8_t((bytes[i] & 15) - zero);",
        "test_numbers and Q4_0 and generic",
        "AssertionError",
    ),
    Bug(
        "low and high halves exchanged on AVX-512",
        "blocks_avx512.h",
        "w[0] = look_up<0>(bytes, table);\n    w[1] = look_up<4>(bytes, table);",
        "w[0] = look_up<4>(bytes, table);\n    w[1] = look_up<0>(bytes, table);",
        "test_numbers and Q4_0 and avx512",
        "AssertionError",
    ),
    Bug(
        "low and high halves exchanged in bf16",
        "blocks_bf16.h",
        "_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1)",
        "_mm512_castsi256_si512(_mm256_srli_epi16(low, 4)), low, 1)",
        "test_numbers and Q4_0 and avx512_bf16",
        "AssertionError",
    ),
    Bug(
        "row offsets in 32 bits",
        "mlp.h",
        "gate + t * gate_stride + n0",
        "gate + int(t) * int(gate_stride) + n0",
        "test_offsets_beyond_int32 and swiglu and float32",
        "signed integer overflow",
    ),
]


def build(source, build_directory, library):
    flags = ["make", "-s", "-j2", "-C", str(source), f"BUILD={build_directory}", f"OPTIMIZE={FLAGS}"]
    done = subprocess.run([*flags, f"{build_directory}/libcna.so"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the library does not build:\n{done.stderr}")
    shutil.copy(build_directory / "libcna.so", library)


def run_tests(directory, *selection):
    """Run the CPU tests against the package in ``directory``; return (exit code, output)."""
    compiler = os.environ.get("CXX", "g++")
    runtime = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # the interpreter's own leaks do not matter
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(directory),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",  # of each worker; tests of several threads ask for them
    }
    code = (
        "import sys, pytest, cna_kernels;"
        f"assert cna_kernels.__file__.startswith({str(directory)!r}), cna_kernels.__file__;"
        f"sys.exit(pytest.main(['-x', '-s', '-p', 'no:cacheprovider', '-m', '', *{selection!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True, errors="replace"
    )
    return done.returncode, done.stdout + done.stderr


def main(quick):
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for part in ("cna_kernels", "model", "csrc", "tests"):
            shutil.copytree(ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", directory)
        (directory / "cna_kernels" / "model").symlink_to(directory / "model")
        library = directory / "cna_kernels" / "cpu" / "libcna.so"
        build(directory / "csrc", directory / "build", library)

        # The tile instructions of a CPU without AMX are emulated by a library of their own, and the tests that start
        # other processes would hand the preloaded sanitizers to compilers.
        selection = "not amx-emulated and not missing_or_wrong and not a_model_gives"
        if quick:
            selection += " and (both or not test_values) and (not test_blocks or rows_end or numbers or own_type)"
        selection += " and (not test_every_family or qwen3 or mistral)"
        workers = ("-n", "2", "--dist", "loadfile", "--max-worker-restart", "0")
        code, output = run_tests(directory, *workers, *SUITE, "-k", selection)
        reports = sum(output.count(report) for report in REPORTS)
        summary = next((line for line in reversed(output.splitlines()) if " passed" in line), "").strip()
        print(f"CPU tests under ASan and UBSan: exit {code}, {reports} reports; {summary}", flush=True)
        if code or reports:
            print(output[-6000:])
            failures += 1

        for bug in [] if quick else BUGS:
            path = directory / "csrc" / bug.file
            text = path.read_text()
            assert text.count(bug.right) == 1, f"{bug.name}: {text.count(bug.right)} places in {bug.file}"
            path.write_text(text.replace(bug.right, bug.wrong))
            build(directory / "csrc", directory / "build", library)
            path.write_text(text)
            code, output = run_tests(directory, *SUITE, "-k", f"{bug.test} and not amx-emulated")
            caught = code != 0 and bug.report in output
            failures += not caught
            print(f"{'caught' if caught else 'MISSED'}: {bug.name}", flush=True)
            if not caught:
                print(output[-3000:])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv[1:]))
