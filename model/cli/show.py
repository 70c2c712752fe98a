"""What `cna show` does."""

from __future__ import annotations

from cna_kernels.circuit import Circuit
from cna_kernels.circuit_file import is_public_code
from cna_kernels.errors import warn
from cna_kernels.files import read_json

from .console import print_line, show_circuit, stdout


def run_show(args):
    record = read_json(args.circuit)
    circuit = Circuit.from_record(record, args.circuit)
    public = is_public_code(record)
    shape = f"the smallest that fits, {circuit.n_layers} layers of {circuit.n_neurons} neurons"
    if public and args.json:
        warn(f"{args.circuit}: n_layers, n_neurons: not in JSON of the public code; written is {shape}")
    elif public:
        print_line(stdout(), f"JSON of the public code. The model's shape is not in the file; assumed is {shape}")
        for name, value in (("target token", record.get("target_token")), ("prompt", record.get("prompt"))):
            if isinstance(value, str) and value:
                print_line(stdout(), f"{name}: {value!r}")
    show_circuit(circuit, as_json=args.json, imported=public)
