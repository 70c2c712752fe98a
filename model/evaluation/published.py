"""What arXiv 2605.12290 publishes of each model, where it stands there, and what a comparison must not overlook.

The paper is "Targeted Neuron Modulation via Contrastive Pair Search", May 2026. Shares are from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, read_json

PAPER = "arXiv 2605.12290"
TOP = 200  # neurons of the circuits whose layers and overlap the paper reports
MAX_NEW_TOKENS = 150  # of the paper's answers, which are greedy
QUESTIONS = 1000  # of MMLU
STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # alpha = 1 - m; 1 is full strength

# Places in the paper.
REFUSAL, QUALITY, LAYERS, OVERLAP = "Table 3", "Tables 1 and 2", "Tables 6 and 7", "Table 8"


@dataclass(frozen=True)
class Published:
    """One of the paper's instruct models.

    Attributes:
        n_layers, n_neurons: its shape: layers, and neurons a layer.
        refusal: share of refusals, unsteered and with 0.1% of the neurons ablated.
        last_three_layers, last_quarter: share of the top 200 neurons that lies there.
        overlap: share of the top 200 neurons that the base model's top 200 have, too.
        note: what to know of these values.
    """

    n_layers: int
    n_neurons: int
    refusal: tuple[float, float]
    last_three_layers: float | None = None
    last_quarter: float | None = None
    overlap: float | None = None
    note: str = ""


_SAME_DIGITS = (
    "The paper's rows of Llama-3.1-8B-Instruct and Llama-3.2-1B-Instruct have the same digits, 90% and 34%. "
    "Take the row of the 8B model as unverified."
)

MODELS: dict[str, Published] = {
    "Llama-3.2-1B-Instruct": Published(16, 8192, (0.90, 0.34), 0.87, 0.90, 0.085),
    "Llama-3.2-3B-Instruct": Published(28, 8192, (0.84, 0.47)),
    "Llama-3.1-8B-Instruct": Published(32, 14336, (0.90, 0.34), note=_SAME_DIGITS),
    "Llama-3.1-70B-Instruct": Published(80, 28672, (0.86, 0.18)),
    "Qwen2.5-1.5B-Instruct": Published(28, 8960, (0.93, 0.12)),
    "Qwen2.5-3B-Instruct": Published(36, 11008, (0.90, 0.58), 0.58, 0.95, 0.14),
    "Qwen2.5-7B-Instruct": Published(28, 18944, (0.87, 0.02)),
    "Qwen2.5-72B-Instruct": Published(80, 29568, (0.78, 0.08)),
}

# Of all eight models together, at full strength: the paper's ranges and statements.
CIRCUIT_QUALITY = (0.969, 0.984)
CAA_QUALITY = (0.406, 0.888)
STATEMENTS = {
    "circuit quality": "0.969 to 0.984 on its eight models",
    "caa quality": "0.406 to 0.888 on its eight models, below 0.6 on six",
    "circuit mmlu": "within 1 point of unsteered at every strength",
    "caa mmlu": "near 0 at full strength",
    "base": "the same late layers as in the instruct model",
}

DIFFERENCES = (
    "The paper's prompts for refusal are 100 harmful prompts of JBB-Behaviors; a run that its authors archived has 99.",
    "The paper's k is 0.1% of the neurons. The public code takes 200 in its API and 1,600 in its experiments, and "
    "never applies the universal filter when it finds a circuit. Here: 0.1% with the filter, and 200 with the filter "
    "where the paper reports on 200.",
    "The public code feeds two BOS tokens to Llama, leaves layers 0 and 1 out and averages in bf16. Here: one BOS, all "
    "layers, totals in fp64.",
    "The paper gives no list of refusal keywords, and the public code has two. Here: the bundled broad list.",
    "The paper does not give the n of the n-grams in its quality; the public code has n = 4, over words. A text of "
    "fewer than 4 words scores 1.0, so quality by words is blind to text without spaces: read quality by tokens "
    "beside it.",
    "The CAA of the public code adds the difference of every layer's MLP output with +alpha, which is towards refusal. "
    "Here this is CAA as released, and the paper's figures of CAA stand beside it. CAA at one layer, its sign chosen, "
    "is what CAA can do.",
    "The likeliest of four letters is right in about 25% of questions by chance, also in a broken model. Only the "
    "generated column can fall as far as the paper's CAA does.",
    "Refusals depend on how long answers may grow: the paper has 150 new tokens.",
)


@dataclass(frozen=True)
class Match:
    """Which of the paper's models stands beside the one in hand.

    Attributes:
        name: its name in MODELS, or None.
        how: how it was recognised, or why it was not.
    """

    name: str | None
    how: str
    published: Published | None = field(default=None, repr=False)


def recognise(directory: FilePath, n_layers: int, n_neurons: int, given: str | None = None) -> Match:
    """Find the paper's model that a checkpoint is, by the name of its folder or by ``_name_or_path`` of config.json.

    A model of another shape is another model, whatever its name.

    Args:
        given: the name that the user gives, which is taken whatever the shape; see :func:`named`.
    """
    if given is not None:
        chosen = named(given)
        return Match(chosen, f"with {chosen}, as the user says", MODELS[chosen])
    for candidate, where in _names(Path(directory)):
        name = _published_name(candidate)
        if name is None:
            continue
        found = MODELS[name]
        if (found.n_layers, found.n_neurons) != (n_layers, n_neurons):
            shape = f"{n_layers} layers of {n_neurons} neurons, not {found.n_layers} of {found.n_neurons}"
            return Match(None, f"with no model of the paper: {where} says {name}, but the model has {shape}")
        return Match(name, f"with {name}, which {where} says", found)
    return Match(None, "with no model of the paper: none has its name; --as NAME says which it is")


def named(given: str) -> str:
    """The name in MODELS that a user gives, in any case. Raises InputError where the paper has no such model."""
    name = _published_name(given)
    if name is None:
        raise InputError("--as", f"expected one of {', '.join(MODELS)}, got {given!r}")
    return name


def _names(directory: Path):
    """The names that a checkpoint may go by, and where each stands."""
    for path in (directory, directory.resolve()):
        yield path.name, "the folder's name"
        if path.parent.name == "snapshots":  # models--ORGANISATION--NAME/snapshots/HASH, as in Hugging Face's cache
            yield path.parents[1].name.rpartition("--")[2], "the folder in the cache"
    config = directory / "config.json"
    if config.is_file():
        record = read_json(config)
        name = record.get("_name_or_path") if isinstance(record, dict) else None
        if isinstance(name, str):
            yield name, "config.json: _name_or_path"


def _published_name(text: str) -> str | None:
    """The name in MODELS that a name or path ends with, whatever its case; None where it is none of them."""
    last = text.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    plain = last.removeprefix("meta-")  # an earlier name of Llama 3.1
    return next((name for name in MODELS if plain == name.lower()), None)
