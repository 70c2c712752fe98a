"""Find and steer the MLP neurons behind a behaviour, inside the forward pass.

The engine: tensors in, tensors out. ``cna_kernels.model`` adds checkpoints, text and the command line.
Nothing heavy is imported here; each name loads its module on first use.
"""

from importlib import import_module

TYPE_CHECKING = False  # as typing has it; importing typing takes longer than all else that `cna` does before main

__version__ = "0.1.0"

_HOME = {
    "gated_mlp": "ops",
    "swiglu": "ops",
    "down_proj": "ops",
    "steer_act": "ops",
    "Scale": "scale",
    "make_scale": "scale",
    "ActivationSums": "sums",
    "Circuit": "circuit",
    "SteeringTable": "steering",
    "Engine": "engine",
    "attach": "engine.attach",
    "attached": "engine.attach",
    "InputError": "errors",
}

__all__ = ["__version__", *_HOME]


if TYPE_CHECKING:  # what a type checker reads instead of ``__getattr__``; test_public_api.py compares the two
    from .circuit import Circuit as Circuit
    from .engine import Engine as Engine
    from .engine.attach import attach as attach
    from .engine.attach import attached as attached
    from .errors import InputError as InputError
    from .ops import down_proj as down_proj
    from .ops import gated_mlp as gated_mlp
    from .ops import steer_act as steer_act
    from .ops import swiglu as swiglu
    from .scale import Scale as Scale
    from .scale import make_scale as make_scale
    from .steering import SteeringTable as SteeringTable
    from .sums import ActivationSums as ActivationSums
else:

    def __getattr__(name):
        if name in _HOME:
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
