"""The neurons of a circuit as a DataFrame of pandas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    import pandas

    from .circuit import Circuit


def frame_of(circuit: Circuit) -> pandas.DataFrame:
    """See ``Circuit.to_pandas``."""
    try:
        import pandas
    except ImportError:
        what = 'not installed: pip install "cna-kernels[pandas]", in a checkout ".[pandas]"'
        raise InputError("pandas", what) from None
    columns: dict[str, tuple[str, Any]] = {
        name: (kind, [neuron[place] for neuron in circuit.neurons])
        for place, (name, kind) in enumerate((("layer", "int64"), ("index", "int64"), ("contrast", "float64")))
    }
    if circuit.positive_mean is not None:
        columns["positive_mean"] = "float64", circuit.positive_mean
    if circuit.bootstrap is not None:
        columns["frequency"] = "float64", circuit.bootstrap["frequency"]
    if circuit.mirrored is not None:
        mirrored = set(circuit.mirrored)
        columns["mirrored"] = "bool", [pair in mirrored for pair in circuit.pairs]
    if circuit.experts is not None:
        places = [circuit.expert_of(*pair) for pair in circuit.pairs]
        columns["expert"] = "int64", [expert for expert, _ in places]
        columns["expert_index"] = "int64", [index for _, index in places]
    return pandas.DataFrame({name: values for name, (_, values) in columns.items()}).astype(
        {name: kind for name, (kind, _) in columns.items()}
    )
