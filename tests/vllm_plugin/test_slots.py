"""Settings in a worker's table: by content, shard by shard, the oldest going when there is no room."""

import random

import numpy as np
import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.scale import dense_scale
from cna_kernels.vllm.setting import Setting, setting_of
from cna_kernels.vllm.slots import Slots

L, N = 3, 2100


def random_setting(seed, k=None):
    draw = random.Random(seed)
    pairs = draw.sample([(layer, index) for layer in range(L) for index in range(N)], k or draw.randint(1, 12))
    circuit = Circuit(tuple((*pair, 1.0) for pair in pairs), L, N)
    setting = setting_of([circuit], [draw.choice([0.0, 0.5, 2.0, -1.0])])
    assert setting is not None
    return setting


def dense_of(setting):
    dense = torch.ones(L, N)
    dense[setting.layer.tolist(), setting.index.tolist()] = torch.tensor(setting.value)
    return dense


def assert_holds(slots, number, setting):
    expected = dense_of(setting)[:, slots.low : slots.low + slots.n]
    for layer in range(L):
        assert torch.equal(dense_scale(slots.table.layer(layer), slots.n)[number], expected[layer])


@pytest.mark.parametrize(("low", "n"), [(0, N), (1050, 1050), (0, 700), (1400, 700)])
def test_a_worker_has_its_shard(low, n):
    slots = Slots(L, low, n, 4, 12, "cpu")
    held = {}
    for seed in range(4):
        setting = random_setting(seed)
        held[slots.number_of(setting.record(), set())] = setting
    assert len(held) == len(slots) == 4
    for number, setting in held.items():
        assert_holds(slots, number, setting)


def test_a_setting_travels_whole():
    setting = random_setting(3, k=40)
    copy = Setting.from_record(setting.record())
    assert copy.digest == setting.digest and all(
        np.array_equal(getattr(copy, n), getattr(setting, n)) for n in ("layer", "index", "value")
    )
    others = [
        Setting(L, N, setting.layer, setting.index, setting.value * 2),
        Setting(L, N + 1, setting.layer, setting.index, setting.value),
    ]
    assert len({setting.digest, *(other.digest for other in others)}) == 3


def test_the_oldest_goes_and_those_in_use_stay():
    slots = Slots(L, 0, N, 2, 12, "cpu")  # room for four settings
    settings = [random_setting(seed, k=5) for seed in range(6)]
    records = [setting.record() for setting in settings]
    numbers = [slots.number_of(record, set()) for record in records[:4]]
    assert sorted(numbers) == [0, 1, 2, 3]
    assert slots.number_of(records[0], set()) == numbers[0], "known by its content"
    in_use = {records[1]["digest"], records[4]["digest"]}
    taken = slots.number_of(records[4], in_use)
    assert taken == numbers[2], "of 2, the longest unused"
    for number, setting in ((numbers[0], 0), (numbers[1], 1), (taken, 4), (numbers[3], 3)):
        assert_holds(slots, number, settings[setting])
    with pytest.raises(InputError, match="table"):
        slots.number_of(records[5], {record["digest"] for record in records[:5]})


def test_any_batch_fits_whatever_was_before():
    """As many requests as may run, each with as many neurons as it may have: no step is ever without room."""
    slots, draw = Slots(L, 0, N, 3, 12, "cpu"), random.Random(0)
    for step in range(200):
        batch = [random_setting(draw.randrange(40), k=None) for _ in range(draw.randint(1, 3))]
        if step % 7 == 0:
            batch = [random_setting(1000 + draw.randrange(20), k=12) for _ in range(3)]
        used = {setting.digest for setting in batch}
        numbers = [slots.number_of(setting.record(), used) for setting in batch]
        for number, setting in zip(numbers, batch, strict=True):
            assert_holds(slots, number, setting)
        assert len(set(numbers)) == len(used)
    assert len(slots) <= 6
