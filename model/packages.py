"""Packages that only a part of the project needs, and the extra of cna-kernels that installs each of them."""

from __future__ import annotations

from importlib.util import find_spec

from cna_kernels.errors import InputError

EXTRA_OF = {
    "tokenizers": "model",
    "jinja2": "model",
    "rich": "model",
    "matplotlib": "plot",
    "cna-kernels-demo": "demo",
    "pyarrow": "eval",
    "lm_eval": "eval",
    "ray": "ray",
}


def missing(*packages: str) -> str | None:
    """Return the command that installs the absent ones of the packages, or None where all are installed."""
    extras = ",".join(dict.fromkeys(EXTRA_OF[name] for name in _absent(packages)))
    return f'not installed: pip install "cna-kernels[{extras}]", in a checkout ".[{extras}]"' if extras else None


def require(*packages: str) -> None:
    """Raise InputError unless all packages are installed; it names the absent ones and the command to install them."""
    if reason := missing(*packages):
        raise InputError(", ".join(_absent(packages)), reason)


def _absent(packages):
    return [name for name in packages if find_spec(name.replace("-", "_")) is None]
