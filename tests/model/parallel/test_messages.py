"""Messages between ranks: values, tensors and objects that both sides hold; short and long ones."""

import gc
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.evaluation.directions import Direction, DirectionTable
from cna_kernels.model.parallel import messages
from cna_kernels.model.parallel.messages import FIRST, Channel, Names, loads
from cna_kernels.model.steering import Steering
from rank_processes import run_ranks

CPU = torch.device("cpu")
LENGTHS = [0, 1, FIRST - 9, FIRST - 8, FIRST - 7, FIRST, 3 * FIRST + 1, 100_000]


class Held:
    """Something of which the other side has a counterpart."""


def table():
    return DirectionTable([Direction("writes", torch.ones(1, 4))], [1.0], 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (5,)])
def test_tensors_keep_their_bits(dtype, shape):
    x = (torch.randn(shape) * 3).to(dtype)
    for given in (x, x.t().contiguous().t() if x.dim() == 2 else x):
        got = loads(Names().dumps(("call", [given], {"x": given})), {}, CPU)
        assert got[0] == "call" and torch.equal(got[1][0], x) and got[2]["x"].dtype == dtype
    if x.numel():
        got[1][0].zero_()  # it may be written to


def test_tensors_of_a_device_land_on_the_receivers():
    """The device "meta" stands for the receiver's GPU."""
    names = Names()
    away = names.persistent_id(torch.ones(2))
    assert away[-1] is False
    reader = messages._Reader(sys.stdin, {}, torch.device("meta"))
    assert reader.persistent_load((*away[:-1], True)).device.type == "meta"
    assert reader.persistent_load(away).device.type == "cpu"


def test_what_both_sides_hold_goes_by_its_number():
    names, mine, theirs = Names(), Held(), Held()
    number = names.give(mine)
    prompt = TokenPrompt([3, 4], "p0")
    got = loads(names.dumps(("step", (mine, prompt, [mine]))), {number: theirs}, CPU)
    assert got[1][0] is theirs and got[1][2][0] is theirs and got[1][1] == prompt
    assert names.dropped() == []
    del mine
    gc.collect()
    assert names.dropped() == [number] and names.dropped() == []


def test_a_large_object_is_sent_once():
    names, held = Names(sent_once=(DirectionTable,)), {}
    directions = table()
    first = names.dumps(Steering(None, None, directions.row_direction([0, -1])))
    again = names.dumps(Steering(None, None, directions.row_direction([-1, 0])))
    assert len(again) < len(first) - 400, "the vectors are in the first alone"
    got = loads(first, held, CPU).edit.table
    assert torch.equal(got.unit, directions.unit)
    edit = loads(again, held, CPU).edit
    assert edit.table is got and edit.chosen.tolist() == [-1, 0]
    assert loads(names.dumps(table()), held, CPU) is not got and len(held) == 2


def exchange():
    """Rank 0 sends, and fails; the other says how many messages came as they were sent, and why rank 0 has failed."""
    dist.init_process_group("gloo")
    channel = Channel()
    if dist.get_rank() == 0:
        for n in LENGTHS:
            channel.send(bytes(i % 251 for i in range(n)))
        time.sleep(1)  # too late for the first who ask
        channel.fail("no more: ü")
        time.sleep(2)  # it has the store
        return
    right = sum(channel.receive() == bytes(i % 251 for i in range(n)) for n in LENGTHS)
    print(right, channel.failure(timedelta(seconds=0.1)), channel.failure(timedelta(seconds=10)))


def test_messages_of_any_length():
    done = run_ranks(2, __file__)
    assert done[1][:2] == (0, f"{len(LENGTHS)} None no more: ü\n"), done


if __name__ == "__main__":
    exchange()
