"""Ranks share the units of rank 0's list, and rank 0 waits for all. test_run_directory.py runs torchrun itself."""

import threading

import pytest
from torch.distributed import HashStore

from cna_kernels import InputError
from cna_kernels.model.discovery import ranks
from cna_kernels.model.discovery.ranks import Ranks


@pytest.fixture
def started(monkeypatch):
    """Three ranks that share a store."""
    store = HashStore()
    monkeypatch.setattr(ranks, "rendezvous", lambda _: iter([(store, 0, 3)]))
    monkeypatch.setattr(ranks, "POLL", 0.01)
    return [Ranks(rank, 3) for rank in range(3)]


def test_shares_are_of_what_rank_0_finds_missing(started):
    late = [2, 9]  # the units that the other ranks find missing, after rank 0 has begun
    assert [rank.share([1, 2, 3, 5, 8, 9, 10] if rank.rank == 0 else late) for rank in started] == [
        [1, 5, 10],
        [2, 8],
        [3, 9],
    ]


def test_rank_0_waits_for_all(started):
    waiting = threading.Thread(target=started[0].wait)
    waiting.start()
    started[2].wait()  # returns at once
    waiting.join(0.2)
    assert waiting.is_alive()
    started[1].wait()
    waiting.join(5)
    assert not waiting.is_alive()


def test_without_torchrun(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"RANK, WORLD_SIZE: expected what torchrun sets: .*MASTER_ADDR"):
        Ranks(0, 2)
