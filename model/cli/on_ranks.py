"""What --tensor-parallel does to a command: torchrun's workers share the model, and rank 0 runs the command.

The other workers make rank 0's forward passes with it, and nothing else; see ``parallel/lead.py``.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable

from cna_kernels.errors import InputError

FLAG = "--tensor-parallel"


def on_ranks(command: Callable[[Namespace], None]) -> Callable[[Namespace], None]:
    """The command for all workers. On rank 0 its arguments have a ``lead``, with which models are loaded."""

    def run(args: Namespace) -> None:
        _check(args)
        import torch

        from ..parallel.lead import Lead, run_led

        if getattr(args, "threads", None) is not None:
            torch.set_num_threads(args.threads)

        def work(lead: Lead) -> None:
            args.lead = lead
            command(args)

        run_led(work, _device(args))

    return run


def _check(args: Namespace) -> None:
    """Refuse what needs the whole model in one process, before anything starts."""
    if args.command == "discover" and (args.run_dir or args.stream_layers or args.batch == "auto"):
        raise InputError(FLAG, "is not for --run-dir, --stream-layers or --batch auto")
    if getattr(args, "engine", None) == "transformers":
        raise InputError(FLAG, "is for our own engine, which --engine transformers is not")
    if getattr(args, "score", None) == "relp":
        raise InputError("--score", f"relp needs gradients of one contrast in one process: it is not for {FLAG}")
    if getattr(args, "alternatives", False) or getattr(args, "curves", False):
        raise InputError(FLAG, "is not for --alternatives and --curves, whose relp needs gradients in one process")
    try:
        world = int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise InputError("RANK, WORLD_SIZE", "expected numbers, as torchrun sets them") from None
    if world < 2:
        raise InputError(FLAG, "is for the workers that torchrun starts, 2 or more")


def _device(args: Namespace) -> str:
    """This worker's device: a CPU, or the GPU of its number on this machine."""
    from ..memory import default_device

    if args.device is not None and args.device.startswith("cuda:"):
        raise InputError("--device", f"every worker has a GPU of its own: expected cuda or cpu, got {args.device}")
    own = args.device is None or args.device == "cuda"
    return str(default_device()) if own else args.device
