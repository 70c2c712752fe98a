"""The C functions with wrong arguments: each gives a documented status, nothing is written, and no signal is raised."""

import ctypes
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cna_kernels.cpu import library

if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "cna.h"
STATUS = {name: int(value) for name, value in re.findall(r"(CNA_(?:OK|ERR_\w+)) = (\d+)", HEADER.read_text())}
OK, VERSION, NULL, SIZE, STRIDE, ALIGN, OVERLAP, SCALE, THREADS, ISA, MEMORY, TYPE, BLOCK = range(13)
T, H, N, C, K = 4, 6, 10, 2, 2

# op -> names of its array arguments, in order. A call also passes extras and n_threads.
ARRAYS = {
    "gated_mlp": ("y", "x", "w_gate", "w_up", "w_down"),
    "swiglu": ("act", "gate", "up"),
    "steer_act": ("act", "act_in"),
    "down_proj": ("y", "act_in", "w_down"),
    "linear": ("y", "x", "w_down_t", "bias"),
}
SIZES = {
    "gated_mlp": dict(T=T, H=H, N=N, y_stride=H, x_stride=H, w_gate_up_stride=H, w_down_stride=N),
    "swiglu": dict(T=T, N=N, act_stride=N, gate_stride=N, up_stride=N),
    "steer_act": dict(T=T, N=N, steered_stride=N, act_stride=N),
    "down_proj": dict(T=T, H=H, N=N, y_stride=H, act_stride=N, w_down_stride=N),
    "linear": dict(T=T, O=H, H=H, y_stride=H, x_stride=H, w_stride=H),
}
OPS = sorted(ARRAYS)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Arguments:
    """The arguments of a valid call, on their own memory. Tests make some of them wrong."""

    def __init__(self, op, dtype, *, extras=True):
        self.function = getattr(library.load(), f"cna_{op}_{dtype}")
        self.element = DTYPES[dtype]
        # each has room for any array of these sizes; inputs are filled with one pattern, the output with another
        fill = dict.fromkeys(ARRAYS[op], b"?") | {ARRAYS[op][0]: b"\x3e"}
        self.memory = {name: ctypes.create_string_buffer(fill[name] * 4096, 4096) for name in ARRAYS[op]}
        self.arrays = {name: ctypes.addressof(memory) for name, memory in self.memory.items()}
        self.sizes = dict(SIZES[op])
        self.n_threads = 2
        self.extras = self._extras() if extras and op != "linear" else None
        self.takes_extras = op != "linear"

    def _extras(self):
        self.token_weight = (ctypes.c_float * (T * C))(*[1.0] * T * C)
        self.act_sum, self.act_sumsq = ((ctypes.c_float * (C * N))(*[5.0] * C * N) for _ in range(2))
        self.row_circuit = (ctypes.c_int32 * T)(0, 1, -1, 0)
        self.offsets = (ctypes.c_int32 * (K * 2))(0, 2, 2, 3)
        self.index = (ctypes.c_int32 * 3)(1, 7, 4)
        self.value = (ctypes.c_float * 3)(0.0, 2.0, 0.5)
        extras = library.Extras(
            version=library.ABI_VERSION, n_columns=C, token_weight_stride=C, act_sum_stride=N, act_sumsq_stride=N
        )
        for name in ("token_weight", "act_sum", "act_sumsq", "row_circuit", "offsets", "index", "value"):
            setattr(extras, name, ctypes.addressof(getattr(self, name)))
        extras.n_circuits, extras.n_entries, extras.offsets_stride = K, 3, 2
        return extras

    def outputs(self):
        first = next(iter(self.memory.values())).raw
        return (first, *((bytes(self.act_sum), bytes(self.act_sumsq)) if self.extras is not None else ()))

    def call(self):
        extras = ()
        if self.takes_extras:
            extras = (None if self.extras is None else ctypes.byref(self.extras),)
        return self.function(*self.arrays.values(), *extras, *self.sizes.values(), self.n_threads)

    def refused(self, status):
        before = self.outputs()
        assert self.call() == status
        assert self.outputs() == before, "written in spite of the error"


each_function = pytest.mark.parametrize(("op", "dtype"), [(op, dtype) for op in OPS for dtype in DTYPES])


def test_every_status_has_a_text():
    texts = [library.load().cna_status_text(code).decode() for code in STATUS.values()]
    assert list(STATUS.values()) == list(range(13)) and len(set(texts)) == 13 and all(texts)
    for code in (-1, 13, 2**31 - 1):
        assert library.load().cna_status_text(code) == b"unknown status"


def test_the_binding_is_the_header():
    """Every function of cna.h is in SIGNATURES with as many arguments, and every struct has the same fields."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    declared = {
        name: [] if arguments.strip() == "void" else arguments.split(",")
        for name, arguments in re.findall(r"CNA_API [\w \*]+?(cna_\w+)\(([^)]*)\)", text)
    }
    assert set(declared) == set(library.SIGNATURES)
    for name, arguments in declared.items():
        assert len(arguments) == len(library.SIGNATURES[name][1]), name
    kinds = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "cna_weight": library.Weight}
    for name in ("Extras", "Weight", "Layer", "Decoder"):
        body = re.search(rf"typedef struct cna_{name.lower()} \{{(.*?)\}}", text, flags=re.S)[1]
        fields = [
            (one.strip(" *\n"), ctypes.c_void_p if "*" in one else kinds[kind])
            for kind, all_of_it in re.findall(r"(?:const )?(\w+) ([^;]+);", body)
            for one in all_of_it.split(",")
        ]
        assert fields == list(getattr(library, name)._fields_), name
    assert int(re.search(r"CNA_ABI_VERSION (\d+)", text)[1]) == library.ABI_VERSION


@each_function
def test_good_arguments(op, dtype):
    for extras in (True, False):
        arguments = Arguments(op, dtype, extras=extras)
        before = arguments.outputs()
        assert arguments.call() == OK
        assert all(a != b for a, b in zip(arguments.outputs(), before, strict=True))


@pytest.mark.parametrize("op", [op for op in OPS if op != "linear"])
def test_sums_in_fp64(op):
    """Beside those in fp32, and instead of them; every fault of theirs has the status of the others."""
    for both in (True, False):
        arguments = Arguments(op, "fp32")
        wide = [(ctypes.c_double * (C * N))(*[5.0] * C * N) for _ in range(2)]
        arguments.extras.act_sum_fp64, arguments.extras.act_sumsq_fp64 = map(ctypes.addressof, wide)
        if not both:
            arguments.extras.act_sum = arguments.extras.act_sumsq = None
        assert arguments.call() == OK
        for own, narrow in zip(wide, (arguments.act_sum, arguments.act_sumsq), strict=True):
            assert list(own) != [5.0] * C * N and (list(narrow) != [5.0] * C * N) == both
            assert not both or all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(narrow, own, strict=True))
    for name, other in (("act_sum_fp64", "act_sumsq_fp64"), ("act_sumsq_fp64", "act_sum_fp64")):
        for wrong, status in ((4, ALIGN), ("same", OVERLAP)):
            arguments = Arguments(op, "fp32")
            wide = (ctypes.c_double * (C * N))(*[5.0] * C * N)
            setattr(arguments.extras, name, ctypes.addressof(wide) + (0 if wrong == "same" else wrong))
            if wrong == "same":
                setattr(arguments.extras, other, ctypes.addressof(wide))
            arguments.refused(status)
            assert list(wide) == [5.0] * C * N
    arguments = Arguments(op, "fp32")
    arguments.extras.act_sum = arguments.extras.act_sumsq = arguments.extras.token_weight = None
    arguments.extras.act_sum_fp64 = ctypes.addressof(wide)
    arguments.refused(NULL)


@each_function
@pytest.mark.parametrize("stride", [0, -1, -(2**63), 2**62, 2**63 - 1])
def test_strides_of_arrays_without_columns(op, dtype, stride):
    """They mean nothing, and are never multiplied: 400 rows of a stride of 2**62 would overflow."""
    empty = {"H": ("x_stride", "y_stride", "w_gate_up_stride", "w_stride"), "N": ("act_stride", "w_down_stride")}
    for name in ("H", "N"):
        if op in ("swiglu", "steer_act") or name not in SIZES[op]:
            continue
        arguments = Arguments(op, dtype, extras=False)
        memory = [ctypes.create_string_buffer(400 * H * 4) for _ in range(2)]
        arguments.memory[ARRAYS[op][0]] = memory[0]
        arguments.arrays |= {ARRAYS[op][0]: ctypes.addressof(memory[0]), ARRAYS[op][1]: ctypes.addressof(memory[1])}
        arguments.sizes |= {"T": 400, name: 0}
        fields = [field for field in empty[name] if field in arguments.sizes and (op, field) != ("linear", "y_stride")]
        arguments.sizes |= dict.fromkeys(fields, stride)
        assert arguments.call() == OK


@each_function
def test_null_pointers(op, dtype):
    for name in ARRAYS[op]:
        arguments = Arguments(op, dtype)
        arguments.arrays[name] = None
        if name == "bias":
            assert arguments.call() == OK, "a layer without bias"
        else:
            arguments.refused(NULL)
    if op == "linear":
        return
    for name in ("token_weight", "row_circuit", "offsets", "index", "value"):
        arguments = Arguments(op, dtype)
        setattr(arguments.extras, name, None)
        arguments.refused(NULL)
    arguments = Arguments(op, dtype)
    arguments.extras.act_sum = arguments.extras.act_sumsq = None
    arguments.refused(NULL)


@each_function
def test_sizes_and_strides(op, dtype):
    for name in SIZES[op]:
        for wrong in (-1, -(2**63), 2**62, 2**63 - 1):
            arguments = Arguments(op, dtype)
            arguments.sizes[name] = wrong
            if name.endswith("stride"):
                expected = STRIDE if wrong < 0 else SIZE
            else:
                expected = SIZE if wrong < 0 or name == "T" else None
            if expected is None:  # a huge row is also longer than the strides
                before = arguments.outputs()
                assert arguments.call() in (SIZE, STRIDE) and arguments.outputs() == before
            else:
                arguments.refused(expected)
        if name.endswith("stride"):
            arguments = Arguments(op, dtype)
            arguments.sizes[name] -= 1
            arguments.refused(STRIDE)
    if op == "linear":
        return
    for name in ("n_columns", "n_circuits", "n_entries"):
        arguments = Arguments(op, dtype)
        setattr(arguments.extras, name, -1)
        arguments.refused(SIZE)
    for name in ("token_weight_stride", "act_sum_stride", "act_sumsq_stride", "offsets_stride"):
        for wrong, expected in ((0, STRIDE), (-5, STRIDE), (2**62, SIZE)):
            arguments = Arguments(op, dtype)
            setattr(arguments.extras, name, wrong)
            arguments.refused(expected)


@each_function
def test_alignment_threads_and_versions(op, dtype):
    for name in ARRAYS[op]:
        arguments = Arguments(op, dtype)
        arguments.arrays[name] += 1
        arguments.refused(ALIGN)
    for n_threads in (0, -1, -(2**31)):
        arguments = Arguments(op, dtype)
        arguments.n_threads = n_threads
        arguments.refused(THREADS)
    arguments = Arguments(op, dtype)
    arguments.n_threads = 2**31 - 1  # far more threads than are ever useful
    assert arguments.call() == OK
    if op == "linear":
        return
    for version in (0, 1, 2, 4, -1, 2**63 - 1):
        arguments = Arguments(op, dtype)
        arguments.extras.version = version
        arguments.refused(VERSION)
    for name in ("token_weight", "act_sum", "act_sumsq", "row_circuit", "offsets", "index", "value"):
        arguments = Arguments(op, dtype)
        setattr(arguments.extras, name, getattr(arguments.extras, name) + 2)
        arguments.refused(ALIGN)


@each_function
def test_overlap(op, dtype):
    output, *inputs = ARRAYS[op]
    for name in inputs:
        for offset in (1, -1, 3) if op == "steer_act" else (0, 1, -1, 3):  # it may write act in place
            arguments = Arguments(op, dtype)
            memory = ctypes.create_string_buffer(4096)
            arguments.memory[output] = memory
            arguments.arrays[output] = ctypes.addressof(memory) + 1024
            arguments.arrays[name] = ctypes.addressof(memory) + 1024 + offset * arguments.element
            arguments.refused(OVERLAP)
    if op == "linear":
        return
    arguments = Arguments(op, dtype)
    arguments.extras.act_sumsq = arguments.extras.act_sum
    arguments.refused(OVERLAP)
    arguments = Arguments(op, dtype)
    arguments.extras.act_sum = arguments.arrays[output]
    arguments.refused(OVERLAP)


def test_halves_of_one_array_do_not_overlap():
    """act may be a column block of the array whose other blocks are gate and up."""
    arguments = Arguments("swiglu", "fp32", extras=False)
    for number, name in enumerate(("act", "gate", "up")):
        arguments.arrays[name] = ctypes.addressof(arguments.memory["act"]) + number * N * 4
        arguments.sizes[f"{name}_stride"] = 3 * N
    assert arguments.call() == OK
    arguments.arrays["gate"] -= 4
    arguments.refused(OVERLAP)


@pytest.mark.parametrize("op", [op for op in OPS if op != "linear"])
def test_circuits_in_use_are_checked(op):
    spoiled = [("offsets", 1, 99), ("offsets", 0, -1), ("offsets", 1, -2), ("offsets", 3, 4)]
    spoiled += [("index", 0, -1), ("index", 1, N), ("index", 1, 1), ("index", 0, 8), ("index", 2, 2**31 - 1)]
    for name, place, wrong in spoiled:
        arguments = Arguments(op, "fp32")
        getattr(arguments, name)[place] = wrong
        arguments.refused(SCALE)
    arguments = Arguments(op, "fp32")
    arguments.index[2], arguments.row_circuit[1] = 99, 2  # circuit 1 is wrong, and no token uses it
    assert arguments.call() == OK


@each_function
def test_empty_arrays_may_be_null(op, dtype):
    for name in ("T", "H", "N", "O"):
        if name not in SIZES[op]:
            continue
        arguments = Arguments(op, dtype, extras=False)
        arguments.sizes[name] = 0
        sizes = arguments.sizes
        empty = {
            "gated_mlp": dict(y=("T", "H"), x=("T", "H"), w_gate=("N", "H"), w_up=("N", "H"), w_down=("H", "N")),
            "swiglu": dict(act=("T", "N"), gate=("T", "N"), up=("T", "N")),
            "steer_act": dict(act=("T", "N"), act_in=("T", "N")),
            "down_proj": dict(y=("T", "H"), act_in=("T", "N"), w_down=("H", "N")),
            "linear": dict(y=("T", "O"), x=("T", "H"), w_down_t=("O", "H"), bias=("O",)),
        }[op]
        for array, axes in empty.items():
            if any(sizes[axis] == 0 for axis in axes):
                arguments.arrays[array] = None
        assert arguments.call() == OK
        if name in ("N", "H") and op in ("gated_mlp", "down_proj", "linear") and arguments.arrays.get("y"):
            y = arguments.memory["y"].raw[: T * H * arguments.element]
            assert op == "linear" or y == bytes(len(y)), "a sum over nothing is 0"


@each_function
@pytest.mark.parametrize("huge", [2**34, 2**46, 2**62, 2**63 - 1])
def test_huge_sizes_of_empty_arrays(op, dtype, huge):
    """With the other sizes 0 every array is empty, however large one size is."""
    for name in ("T", "H", "N", "O"):
        if name in SIZES[op]:
            arguments = Arguments(op, dtype, extras=False)
            arguments.arrays = dict.fromkeys(arguments.arrays)
            arguments.sizes = dict.fromkeys(arguments.sizes, 0) | {name: huge}
            assert arguments.call() == (OK if huge <= 2**46 else SIZE)


def test_a_single_row_between_the_rows_of_the_output():
    arguments = Arguments("linear", "fp32")
    arguments.sizes["y_stride"] = 2 * H
    arguments.arrays["bias"] = arguments.arrays["y"] + H * 4
    assert arguments.call() == OK
    arguments.arrays["bias"] -= 4
    arguments.refused(OVERLAP)


def test_random_arguments_never_raise_a_signal():
    """Runs in its own process, so that a signal shows as an exit code and does not end the tests."""
    done = subprocess.run([sys.executable, __file__, "3000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"3000 calls: .*\n", done.stdout), done.stdout


def fuzz(n_calls, seed=0):
    """Calls with one to three arguments made wrong at random, each in a way that the library can detect."""
    random_number = random.Random(seed)
    counts = dict.fromkeys(range(13), 0)
    for _ in range(n_calls):
        arguments = Arguments(random_number.choice(OPS), random_number.choice(list(DTYPES)))
        for _ in range(random_number.randint(1, 3)):
            spoil(arguments, random_number)
        status = arguments.call()
        counts[status] += 1  # raises KeyError for a status that is not documented
    assert all(counts[code] for code in (VERSION, NULL, SIZE, STRIDE, ALIGN, OVERLAP, THREADS)), counts
    print(f"{n_calls} calls:", ", ".join(f"{name} {counts[code]}" for name, code in STATUS.items() if counts[code]))


def spoil(arguments, random_number):
    kind = random_number.choice(["null", "align", "size", "stride", "huge", "threads", "overlap", "extras"])
    array = random_number.choice(list(arguments.arrays))
    size = random_number.choice([name for name in arguments.sizes if "stride" not in name])
    if kind == "null":
        arguments.arrays[array] = None
    elif kind == "align":
        arguments.arrays[array] = (arguments.arrays[array] or 4096) | 1
    elif kind == "size":
        arguments.sizes[size] = -random_number.randint(1, 2**63)
    elif kind == "stride":
        stride = random_number.choice([name for name in arguments.sizes if "stride" in name])
        arguments.sizes[stride] = random_number.choice([0, -1, -(2**63), 2**60, 2**63 - 1])
    elif kind == "huge":
        arguments.sizes[size] = random_number.randint(2**48, 2**63 - 1)
    elif kind == "threads":
        arguments.n_threads = random_number.choice([0, -1, -(2**31)])
    elif kind == "overlap":
        arguments.arrays[array] = next(iter(arguments.arrays.values()))
    elif arguments.extras is not None:
        field = random_number.choice([name for name, _ in library.Extras._fields_])
        pointer = dict(library.Extras._fields_)[field] is ctypes.c_void_p
        setattr(arguments.extras, field, random_number.choice([None, 1, 3] if pointer else [-1, 2**62, -(2**63)]))


if __name__ == "__main__":
    fuzz(int(sys.argv[1]))
