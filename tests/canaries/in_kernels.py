"""Bugs in the Triton kernels."""

from canary import Canary

TRITON = "tests/kernels/test_triton.py"

CANARIES = [
    Canary(
        "unwritten tail",
        "cna_kernels/triton/swiglu.py",
        "n_stored = tl.where(tl.program_id(2) == 0, N, 0)",
        "n_stored = tl.where(tl.program_id(2) == 0, N // 16 * 16, 0)",
        TRITON,
        "test_values and swiglu and 63x130x72-bfloat16-plain",
    ),
    Canary(
        "set instead of add",
        "cna_kernels/triton/sums.py",
        "tl.store(here, tl.load(here, mask=mask, other=0.0) + value, mask=mask)",
        "tl.store(here, value, mask=mask)",
        TRITON,
        "test_values and flat and 16x136x200-bfloat16-sums",
    ),
    Canary(
        "dropped last token",
        "cna_kernels/triton/swiglu.py",
        "        t_mask = t < t_last\n        mask",
        "        t_mask = t < t_last - 1\n        mask",
        TRITON,
        "test_values and swiglu and 16x136x200-bfloat16-plain",
    ),
    Canary(
        "wrong stride",
        "cna_kernels/triton/swiglu.py",
        "act = tl.load(gate_ptr + t[:, None] * stride_gate_t",
        "act = tl.load(gate_ptr + t[:, None] * N",
        TRITON,
        "test_values and swiglu and 16x136x200-bfloat16-plain",
    ),
    Canary(
        "int32 offset",
        "cna_kernels/triton/swiglu.py",
        "t = (t_start + tl.arange(0, BLOCK_T)).to(tl.int64)",
        "t = t_start + tl.arange(0, BLOCK_T)",
        TRITON,
        "test_offsets_beyond_int32 and swiglu",
    ),
    Canary(
        "row -1 scaled",
        "cna_kernels/triton/steer.py",
        "steered = (circuit >= 0) & (circuit < steer_args.n_circuits)",
        "steered = circuit < steer_args.n_circuits\n    circuit = tl.maximum(circuit, 0)",
        TRITON,
        "test_multiplier_one_and_no_circuit and swiglu",
    ),
    Canary(
        "scale before the sum",
        "cna_kernels/triton/ops.py",
        "return launch.linear(pass_over(act, *extras), w_down)",
        "given = _keywords(extras)\n"
        "        steer = {name: given[name] for name in ('scale', 'row_circuit')}\n"
        "        return launch.linear(pass_over(steer_act(act, **steer), *extras[:3], *[None] * 4), w_down)",
        TRITON,
        "test_sums_come_before_scaling and down_proj-blas",
    ),
    Canary(
        "wrong circuit row",
        "cna_kernels/triton/steer.py",
        "row = steer_args.offsets_ptr + circuit.to(tl.int64) * steer_args.stride_offsets_k",
        "row = steer_args.offsets_ptr + (circuit // 2).to(tl.int64) * steer_args.stride_offsets_k",
        TRITON,
        "test_values and swiglu and 16x136x200-bfloat16-circuits",
    ),
    Canary(
        "split-K part lost",
        "cna_kernels/triton/down_decode.py",
        "    for s in range(S):\n",
        "    for s in range(S - 1):\n",
        TRITON,
        "test_values and split and 130x1032x72-bfloat16-plain",
    ),
    Canary(
        "wrong mask",
        "cna_kernels/triton/gate_up_decode.py",
        "w = tl.load(w_row + k[None, :], mask=w_mask[:, None] & (k < H)[None, :], other=0.0)",
        "w = tl.load(w_row + k[None, :], mask=w_mask[:, None] & (k < H - 1)[None, :], other=0.0)",
        TRITON,
        "test_values and flat and 16x136x200-bfloat16-plain",
    ),
    Canary(
        "summed block skipped",
        "cna_kernels/triton/sums.py",
        "if any_counts(token_weight_row, t_mask, c_first, C, BLOCK_C) > 0:",
        "if any_counts(token_weight_row, t_mask, c_first, C, BLOCK_C) > 1:",
        TRITON,
        "test_values and tma and 130x1032x72-bfloat16-sums",
    ),
    Canary(
        "act left scaled",
        "cna_kernels/triton/steer.py",
        "_patch(act, saved, Steer(scale, row_circuit), restore=True)",
        "_patch(act, saved, Steer(scale, row_circuit), restore=False)",
        "tests/kernels/test_repeat.py",
        "test_down_proj_leaves_act_as_it_was and tma",
    ),
    Canary(
        "held act of the wrong neuron",
        "cna_kernels/triton/steer.py",
        "same = index[None, :] == n[:, None]",
        "same = index[None, :] == n[:, None] + 1",
        TRITON,
        "test_values and gemv and 1x48x24-bfloat16-circuits",
    ),
    Canary(
        "repeat off 16 bytes",
        "cna_kernels/triton/repeat.py",
        "if tensors[place].data_ptr() & 15:",
        "if tensors[place].data_ptr() & 0:",
        "tests/kernels/test_repeat.py",
        "test_addresses_that_the_code_was_not_compiled_for",
    ),
]
