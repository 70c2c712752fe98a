"""What rank 0 tells the other ranks: the name of a call and its arguments, in bytes.

Tensors land on the receiver's device. An object that the receiver has a counterpart of, as a cache or a table, goes by
its number. Ranks are processes of one user's job: they trust each other's pickles.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
import time
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FIRST = 4096  # bytes that every message begins with, its length among them: most have no more
_LENGTH = 8
_CHANNELS = itertools.count()  # of this process; every rank counts the same
PATIENCE = timedelta(days=30)  # between two calls rank 0 may judge answers, or draw pictures, for as long as it likes


class Channel:
    """Broadcasts from rank 0 over gloo, whatever the model's device. All ranks make a Channel at the same time.

    Why rank 0 has failed is told another way, by the job's key-value store: the other ranks may be waiting in a call.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._store, self._key = dist.distributed_c10d._get_default_store(), f"cna/failed/{next(_CHANNELS)}"

    def send(self, data: bytes) -> None:
        """Send a message; return when it is on its way. RuntimeError: another rank is gone."""
        whole = len(data).to_bytes(_LENGTH, "little") + data
        for piece in (whole[:FIRST].ljust(FIRST, b"\0"), whole[FIRST:]):
            if piece:
                dist.broadcast(torch.frombuffer(bytearray(piece), dtype=torch.uint8), 0, group=self._group)

    def receive(self) -> bytes:
        """Wait for the next message. RuntimeError: another rank is gone."""
        first = torch.empty(FIRST, dtype=torch.uint8)
        dist.broadcast(first, 0, group=self._group)
        head = first.numpy().tobytes()
        missing = int.from_bytes(head[:_LENGTH], "little") + _LENGTH - FIRST
        if missing <= 0:
            return head[_LENGTH : FIRST + missing]
        rest = torch.empty(missing, dtype=torch.uint8)
        dist.broadcast(rest, 0, group=self._group)
        return head[_LENGTH:] + rest.numpy().tobytes()

    def fail(self, why: str) -> None:
        """Let the other ranks know why rank 0 has failed. Waits for nobody."""
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that had it
            self._store.set(self._key, why)

    def failure(self, wait: timedelta) -> str | None:
        """Why rank 0 has failed; None: it does not say so for so long."""
        end = time.monotonic() + wait.total_seconds()
        with contextlib.suppress(RuntimeError):
            while not self._store.check([self._key]):  # a wait that ends without it would print a warning
                if time.monotonic() > end:
                    return None
                time.sleep(0.05)
            return self._store.get(self._key).decode()
        return None


class Names:
    """The numbers of rank 0's objects that the other ranks have counterparts of.

    Objects of the types ``sent_once`` get theirs when they are sent for the first time; others by :meth:`give`.
    """

    def __init__(self, sent_once: tuple[type, ...] = ()) -> None:
        self._sent_once = sent_once
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._dropped: list[int] = []
        self._next = 0

    def give(self, x: object) -> int:
        """A number for an object. When the object goes, its number is among those of :meth:`dropped`."""
        number, self._next = self._next, self._next + 1
        self._numbers[x] = number
        weakref.finalize(x, self._dropped.append, number)
        return number

    def dropped(self) -> list[int]:
        """The numbers of objects that have gone since the last call."""
        gone = self._dropped[:]
        del self._dropped[: len(gone)]
        return gone

    def dumps(self, value: object) -> bytes:
        """``value`` as :func:`loads` reads it."""
        return _dumps(self, value, None)

    def persistent_id(self, x: object) -> tuple | None:
        """What stands in a message for an object; None: the object itself."""
        if isinstance(x, Tensor):
            flat = x.detach().cpu().contiguous().flatten()
            return "tensor", flat.view(torch.uint8).numpy().tobytes(), x.dtype, tuple(x.shape), x.device.type != "cpu"
        try:
            number = self._numbers.get(x)
        except TypeError:  # of a type that is compared by value, or has no weak references
            return None
        if number is not None:
            return "held", number
        if isinstance(x, self._sent_once):
            return "new", self.give(x), _dumps(self, x, x)
        return None


def loads(data: bytes, held: dict[int, Any], device: torch.device) -> Any:
    """What :meth:`Names.dumps` wrote. ``held`` has the counterparts by number; new ones are added."""
    return _Reader(io.BytesIO(data), held, device).load()


def _dumps(names: Names, value: object, itself: object) -> bytes:
    file = io.BytesIO()
    _Writer(file, names, itself).dump(value)
    return file.getvalue()


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, names: Names, itself: object):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.names, self.itself = names, itself

    def persistent_id(self, x):
        return None if x is self.itself else self.names.persistent_id(x)


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, held: dict[int, Any], device: torch.device):
        super().__init__(file)
        self.held, self.device = held, device

    def persistent_load(self, name):
        kind, *rest = name
        if kind == "held":
            return self.held[rest[0]]
        if kind == "new":
            number, data = rest
            self.held[number] = loads(data, self.held, self.device)
            return self.held[number]
        data, dtype, shape, on_device = rest
        x = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return x.view(shape).to(self.device) if on_device else x.view(shape)
