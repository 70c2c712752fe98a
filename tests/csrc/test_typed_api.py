"""The C functions that take a cna_weight, with wrong weights: a documented status each, and nothing is written."""

import ctypes

import pytest
from test_c_api import ALIGN, BLOCK, NULL, OK, OVERLAP, SIZE, STRIDE, THREADS, TYPE

from cna_kernels.blocks import FORMATS
from cna_kernels.cpu import library

if reason := library.missing():
    pytest.skip(f"the CPU engine {reason}", allow_module_level=True)

T, H, N = 3, 256, 512
PLAIN = {"bf16": (30, 2), "fp16": (1, 2), "fp32": (0, 4)}


class Weight(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("type", ctypes.c_int64), ("row_bytes", ctypes.c_int64))


class Arguments:
    """The arguments of a valid call. Tests make some of them wrong."""

    def __init__(self, op, dtype, kind="Q4_K"):
        self.function = getattr(library.load(), f"cna_{op}_{dtype}")
        self.output = ctypes.create_string_buffer(b"\x3e" * T * N * 4, T * N * 4)
        self.input = ctypes.create_string_buffer(b"?" * T * N * 4, T * N * 4)
        self.memory = ctypes.create_string_buffer(b"?" * 4 * H * N, 4 * H * N)
        shapes = {"gated_mlp_typed": (H, H, N), "down_proj_typed": (N,), "linear_typed": (H,), "dequantize": (H,)}[op]
        self.weights = [Weight(ctypes.addressof(self.memory), *self.layout(kind, dtype, n)) for n in shapes]
        self.pointers = [ctypes.byref(weight) for weight in self.weights]
        self.out, self.x, self.n_threads = ctypes.addressof(self.output), ctypes.addressof(self.input), 2
        self.op = op
        self.sizes = {
            "gated_mlp_typed": [T, H, N, H, H], "down_proj_typed": [T, H, N, H, N], "linear_typed": [T, N, H, N, H],
            "dequantize": [T, H, H],
        }[op]  # fmt: skip

    @staticmethod
    def layout(kind, dtype, n):
        if kind not in FORMATS:
            number, size = PLAIN[kind]
            return number, n * size
        number, elements, n_bytes = FORMATS[kind]
        return number, n // elements * n_bytes

    def call(self):
        if self.op == "dequantize":
            return self.function(self.out, *self.pointers, *self.sizes, self.n_threads)
        bias = (None,) if self.op == "linear_typed" else ()
        extras = () if self.op == "linear_typed" else (None,)
        return self.function(self.out, self.x, *self.pointers, *bias, *extras, *self.sizes, self.n_threads)

    def refused(self, status):
        before = self.output.raw
        assert self.call() == status
        assert self.output.raw == before, "written in spite of the error"


OPS = ("gated_mlp_typed", "down_proj_typed", "linear_typed", "dequantize")
each = pytest.mark.parametrize(("op", "dtype"), [(op, dtype) for op in OPS for dtype in PLAIN])


@each
@pytest.mark.parametrize("kind", [*FORMATS, "own"])
def test_good_arguments(op, dtype, kind):
    arguments = Arguments(op, dtype, dtype if kind == "own" else kind)
    if (op, kind) == ("dequantize", "own"):
        return arguments.refused(TYPE)
    before = arguments.output.raw
    assert arguments.call() == OK and arguments.output.raw != before


@each
def test_wrong_weights(op, dtype):
    for number in range(len(Arguments(op, dtype).weights)):
        wrong = [("type", value, TYPE) for value in (-1, 4, 10, 16, 28, 31, 2**40)]
        wrong += [("type", PLAIN[other][0], TYPE) for other in PLAIN if other != dtype]
        wrong += [("at", None, NULL), ("row_bytes", -1, STRIDE), ("row_bytes", 2**62, SIZE), ("row_bytes", 0, STRIDE)]
        for field, value, status in wrong:
            arguments = Arguments(op, dtype)
            setattr(arguments.weights[number], field, value)
            arguments.refused(status)
        arguments = Arguments(op, dtype)
        arguments.weights[number].row_bytes -= 1
        arguments.refused(STRIDE)
        for pointer, status in ((None, NULL), (ctypes.addressof(arguments.weights[number]) + 4, ALIGN)):
            arguments = Arguments(op, dtype)
            arguments.pointers[number] = pointer
            arguments.refused(status)
        arguments = Arguments(op, dtype)
        arguments.weights[number].at = arguments.out
        arguments.refused(OVERLAP)
    arguments = Arguments(op, dtype)
    arguments.n_threads = 0
    arguments.refused(THREADS)


@each
def test_rows_that_are_no_whole_blocks(op, dtype):
    """255 numbers are no block of 256; 31 are none of 32."""
    for kind, less in (("Q4_K", 1), ("Q6_K", 128), ("Q4_0", 1), ("Q8_0", 16)):
        arguments = Arguments(op, dtype, kind)
        place = {"gated_mlp_typed": 1, "down_proj_typed": 2, "linear_typed": 2, "dequantize": 1}[op]
        arguments.sizes[place] -= less
        arguments.refused(BLOCK)


@each
def test_the_functions_own_type_is_aligned(op, dtype):
    if op == "dequantize":
        return
    arguments = Arguments(op, dtype, dtype)
    arguments.weights[0].row_bytes += 1
    arguments.refused(ALIGN)
    arguments = Arguments(op, dtype, dtype)
    arguments.weights[0].at += 1
    arguments.refused(ALIGN)


@each
def test_blocks_lie_at_any_address_and_empty_weights_may_be_null(op, dtype):
    arguments = Arguments(op, dtype)
    for weight in arguments.weights:
        weight.at += 1
    assert arguments.call() == OK
    arguments = Arguments(op, dtype)
    arguments.sizes[{"gated_mlp_typed": 2, "down_proj_typed": 1, "linear_typed": 1, "dequantize": 0}[op]] = 0
    for weight in arguments.weights:
        weight.at, weight.row_bytes = None, -5
    assert arguments.call() == OK
