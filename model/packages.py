"""Packages that only a part of the project needs, and the extra of cna-kernels that installs each of them."""

from __future__ import annotations

from importlib.util import find_spec

from cna_kernels.errors import InputError

EXTRA_OF = {
    "tokenizers": "model",
    "jinja2": "model",
    "rich": "model",
    "gguf": "gguf",
    "matplotlib": "plot",
    "cna-kernels-demo": "demo",
    "pandas": "pandas",
    "pyarrow": "eval",
    "lm_eval": "eval",
    "ray": "ray",
    "transformers": "hf",
    "accelerate": "hf",
    "huggingface_hub": "hub",
    "datasets": "datasets",
}


def missing(*packages: str) -> str | None:
    """Return that packages are not installed, with the command that installs them, or None where none is absent."""
    extras = ",".join(dict.fromkeys(EXTRA_OF[name] for name in _absent(packages)))
    beside = " ./model/demo/checkpoints" if "demo" in extras else ""
    command = f'pip install "cna-kernels[{extras}]", in a checkout ".[{extras}]"{beside}'
    return f"not installed: {command}" if extras else None


def require(*packages: str) -> None:
    """Raise InputError unless all packages are installed; it names the absent ones and the command to install them."""
    if reason := missing(*packages):
        raise InputError(", ".join(_absent(packages)), reason)


def _absent(packages):
    return [name for name in packages if find_spec(name.replace("-", "_")) is None]
