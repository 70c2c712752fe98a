"""Packages that only a part of the project needs, and the extra of cna-kernels that brings each."""

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
    """Return what installs those of the packages that are absent, or None where all are there."""
    extras = ",".join(dict.fromkeys(EXTRA_OF[name] for name in _absent(packages)))
    return f'not installed: pip install "cna-kernels[{extras}]", in a checkout ".[{extras}]"' if extras else None


def require(*packages: str) -> None:
    """Raise InputError, one line that names the absent packages and what installs them."""
    if reason := missing(*packages):
        raise InputError(", ".join(_absent(packages)), reason)


def _absent(packages):
    return [name for name in packages if find_spec(name.replace("-", "_")) is None]
