"""Writes example.f32, the arrays that example.c loads: the definition's own inputs and results, raw float32.

python examples/c/example_data.py
"""

from pathlib import Path

import torch

from cna_kernels import make_scale, reference

T, H, N, C = 3, 16, 48, 2
CIRCUIT = {5: 0.0, 40: 2.0}  # neuron -> multiplier


def arrays() -> list[torch.Tensor]:
    """Return x, w_gate_up, w_down, token_weight, act_sum before the call, and y and act_sum after it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, H), (2 * N, H), (H, N), (T, C), (C, N)]
    x, w_gate_up, w_down, token_weight, before = (
        torch.randn(shape, generator=generator, dtype=torch.float64).float() for shape in shapes
    )
    row_circuit = torch.tensor([0, -1, 0], dtype=torch.int32)
    act_sum = before.double()
    y = reference.gated_mlp(
        x.double(),
        w_gate_up.double(),
        w_down.double(),
        token_weight=token_weight.double(),
        act_sum=act_sum,
        scale=make_scale([CIRCUIT], N),
        row_circuit=row_circuit,
    )
    return [x, w_gate_up, w_down, token_weight, before, y.float(), act_sum.float()]


if __name__ == "__main__":
    path = Path(__file__).with_name("example.f32")
    path.write_bytes(b"".join(array.numpy().tobytes() for array in arrays()))
