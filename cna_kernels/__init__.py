"""Find and steer the MLP neurons behind a behaviour, inside the forward pass.

The engine: tensors in, tensors out. ``cna_kernels.model`` adds checkpoints, text and the command line.
Nothing heavy is imported here; each name loads its module on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "gated_mlp": "ops",
    "swiglu": "ops",
    "down_proj": "ops",
    "steer_act": "ops",
    "Scale": "reference",
    "make_scale": "reference",
    "ActivationSums": "sums",
    "Circuit": "circuit",
    "SteeringTable": "steering",
    "Engine": "engine",
    "attach": "engine",
    "attached": "engine",
    "InputError": "checks",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
