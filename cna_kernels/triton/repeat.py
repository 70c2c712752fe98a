"""Repeating: a launcher's allocations and launches, recorded once and made again for other tensors.

Triton binds, specialises, hashes and looks up the arguments of every launch, 15 to 40 us of Python each. For tensors
that look like those of an earlier call, the result of all this is the same. A repeated launch only puts the new
addresses in the places of the old ones: 2 to 3 us (`make bench-host`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import LISTENING, Distance, is_listing
from .tiles import INTERPRETED

try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    DESCRIPTORS: tuple[Any, ...] = (TensorDescriptor, GluonDescriptor)
except ImportError:
    DESCRIPTORS = (TensorDescriptor,)


class Repeat:
    """A launcher, called again and again with tensors that differ in their addresses alone.

    The first call runs the launcher and records it. Everything else must be the same in later calls, as it is for calls
    that look alike to ``ops``: shapes, strides, dtypes, device, and what is None.

    The launcher itself runs again where the record would be wrong: under a launch hook of Triton (a profiler); for
    tensors that do not start on 16 bytes where the recorded ones did, or at a distance of another kind, because the
    compiled code relies on both; and if it launches on tensors that it neither was given nor allocated.
    """

    def __init__(self, launcher: Callable) -> None:
        self._launcher, self.record = launcher, None

    def __call__(self, *tensors):
        record = self.record
        if record is None:
            return self._first(tensors)
        hooks = triton.knobs.runtime
        if not record.launches or _is_set(hooks.launch_enter_hook) or _is_set(hooks.launch_exit_hook):
            return self._launcher(*tensors)
        for place in record.aligned:
            if tensors[place].data_ptr() & 15:
                return self._launcher(*tensors)
        slots = [*tensors]
        for like, shape, dtype in record.memory:
            new = slots[like].new_empty
            slots.append(new(*shape) if dtype is None else new(shape, dtype=dtype))
        for first, second, itemsize, kind in record.distances:
            elements = (slots[second].data_ptr() - slots[first].data_ptr()) // itemsize
            if _kind_of_int(elements) != kind:
                return self._launcher(*tensors)
            slots.append(elements)
        for base, descriptor in record.descriptors:
            slots.append(_of_other_base(descriptor, slots[base]))
        slots += record.constants
        index = record.device_index
        if index is None or index == torch._C._cuda_getDevice():
            _launch_all(record, slots)
        else:
            with torch.cuda.device(index):
                _launch_all(record, slots)
        return slots[record.result]

    def _first(self, tensors):
        given = [id(x) for x in tensors if x is not None]
        one_in_two_places = len(set(given)) < len(given)  # then a record cannot say which place is meant
        if one_in_two_places or is_listing():
            return self._launcher(*tensors)
        outer, LISTENING.recorder = getattr(LISTENING, "recorder", None), Recorder(tensors)
        try:
            result = self._launcher(*tensors)
            self.record = LISTENING.recorder.record(result)
        finally:
            LISTENING.recorder = outer
        return result


class Record(NamedTuple):
    """What a launcher does, its tensors and numbers by their places in a list of slots.

    The slots are, in this order: the tensors given, the memory, the distances, the descriptors, the constants.
    """

    launches: list[tuple]  # run, grid x, y, z, function, metadata, and a function that picks its arguments
    memory: list[tuple]  # place of a tensor on the same device, shape, and the dtype if it differs
    distances: list[tuple]  # places of the two ends, bytes of an element, kind of the number
    descriptors: list[tuple]  # place of the base, and a descriptor of another base
    constants: list
    aligned: list[int]  # places of the given tensors that must start on 16 bytes
    result: int
    device_index: int | None  # None: not a CUDA device
    stream: Callable[[int], int]


def _launch_all(record, slots):
    stream = record.stream(record.device_index)
    for run, x, y, z, function, metadata, pick in record.launches:
        run(x, y, z, stream, function, metadata, None, None, None, *pick(slots))


INCOMPLETE = Record([], [], [], [], [], [], 0, None, lambda _: 0)


class Recorder:
    """Is told of a launcher's allocations and launches by ``launch.py``."""

    def __init__(self, tensors):
        self.tensors, self.memory, self.calls = tensors, [], []

    def allocated(self, tensor: Tensor) -> None:
        self.memory.append(tensor)

    def launched(self, kernel, compiled, grid, args, options) -> None:
        names = kernel.arg_names
        arguments = (*args, *(options[name] for name in names[len(args) :]))
        if INTERPRETED:
            options = {name: value for name, value in options.items() if name not in names}
            run, function, metadata = _interpret, kernel, options
        else:
            run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        free = [p.do_not_specialize or p.do_not_specialize_on_alignment for p in getattr(kernel, "params", ())]
        fixed = [
            x for x, any_address in zip(arguments, free or [False] * len(arguments), strict=True) if not any_address
        ]
        self.calls.append((run, (*grid, 1, 1)[:3], function, metadata, arguments, fixed))

    def record(self, result: Tensor) -> Record:
        """The record of the launcher; INCOMPLETE if it uses tensors that it neither was given nor allocated."""
        given, memory = list(self.tensors), self.memory
        place = {id(x): i for i, x in enumerate([*given, *memory]) if x is not None}
        all_arguments = [x for *_, arguments, _ in self.calls for x in arguments]
        distances = [x for x in all_arguments if isinstance(x, Distance)]
        descriptors = [x for x in all_arguments if isinstance(x, DESCRIPTORS)]
        used = [x for x in all_arguments if isinstance(x, Tensor)]
        used += [result, *(x.base for x in descriptors), *(end for x in distances for end in x.ends)]
        if any(id(x) not in place for x in used):
            return INCOMPLETE
        apart = [*given, *memory, *distances, *descriptors]
        place |= {id(x): i for i, x in enumerate(apart) if x is not None}
        constants = []

        def find(argument):
            if isinstance(argument, (Tensor, Distance, *DESCRIPTORS)):
                return place[id(argument)]
            constants.append(argument)
            return len(apart) + len(constants) - 1

        launches = [
            (run, *grid, function, metadata, itemgetter(*map(find, arguments)))
            for run, grid, function, metadata, arguments, _ in self.calls
        ]
        fixed = [x for *_, own in self.calls for x in own if isinstance(x, Tensor)] + [x.base for x in descriptors]
        aligned = {place[id(x)] for x in fixed if x.data_ptr() % 16 == 0} & set(range(len(given)))
        device = result.device
        return Record(
            launches,
            [self._memory(x, given) for x in memory],
            [(*(place[id(end)] for end in x.ends), x.ends[0].element_size(), _kind_of_int(x)) for x in distances],
            [(place[id(x.base)], _of_other_base(x, None)) for x in descriptors],
            constants,
            sorted(aligned),
            place[id(result)],
            device.index if device.type == "cuda" else None,
            _no_stream if INTERPRETED else triton.runtime.driver.active.get_current_stream,
        )

    @staticmethod
    def _memory(tensor, given):
        """How to allocate it: like a given tensor, of the same dtype if there is one: naming a dtype costs 0.5 us."""
        for place, x in enumerate(given):
            if x is not None and x.dtype == tensor.dtype and x.device == tensor.device:
                return place, tuple(tensor.shape), None
        return next(i for i, x in enumerate(given) if x is not None), tuple(tensor.shape), tensor.dtype


def variant(kernel, args, options) -> tuple:
    """What Triton compiles a launch for: launches of the same kernel with the same variant share the compiled code."""
    free = kernel.do_not_specialize if hasattr(kernel, "do_not_specialize") else ()
    kinds: list[object] = []
    for name, x in zip(kernel.arg_names, args, strict=False):
        if isinstance(x, Tensor):
            kinds.append(x.dtype)
        elif isinstance(x, DESCRIPTORS):
            kinds.append((x.base.dtype, *x.block_shape))
        elif isinstance(x, int):
            kinds.append("int" if name in (free or ()) else _kind_of_int(x))
        else:
            kinds.append(x)
    return kernel, tuple(kinds), tuple(sorted(options.items()))


def _interpret(x, y, z, stream, kernel, options, *rest):
    kernel[x, y, z](*rest[3:], **options)


def _no_stream(_):
    return 0


def _is_set(hook):
    """Whether a launch hook is set: a chain with calls in it, or a function in the chain's place."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _kind_of_int(value):
    """What Triton compiles an integer argument for: whether it fits 32 bits, is 1, is a multiple of 16."""
    return -(2**31) <= value < 2**31, value == 1, value % 16 == 0


def _of_other_base(descriptor, base):
    """A copy of the descriptor for ``base``, a tensor that looks like the descriptor's own."""
    other = copy.copy(descriptor)
    other.base = base
    return other
