"""Ranks without torchrun: a program as several processes that share a model over gloo."""

import os
import subprocess
import sys
import time

from torch.distributed import TCPStore

LONGEST = 100.0  # seconds; a group that hangs gives up earlier, and says so


def run_ranks(n_ranks, *words, longest=LONGEST):
    """``python *words`` as so many ranks. Returns for each rank its exit code, stdout and stderr."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun: it outlives rank 0
    shared = dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0", OMP_NUM_THREADS="1")
    shared |= dict(WORLD_SIZE=str(n_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    shared["PYTHONPATH"] = os.pathsep.join(sys.path)  # with tests/, where tiny.py is
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, words)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n_ranks)
    ]  # fmt: skip
    end = time.monotonic() + longest
    try:
        said = [process.communicate(timeout=end - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]
