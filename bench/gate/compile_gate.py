"""Compile every kernel that ships, for every target, without a GPU, read the machine code, and fail on what is slow.

    python bench/gate/compile_gate.py --out DIR [--targets 80,90,100,gfx942] [--quick]

Writes DIR/compile_gate_triton_<version>.json and .md, which also hold the times that the cost functions predict. A row
fails on any of these: a register spill; ptxas serialising matrix instructions (notice C75xx); a bf16 or fp16 product on
sm_90 without wgmma (HGMMA); a left factor in registers that is overwritten while it is read (``register_a.py``); more
shared memory than a program may use; instruction counts that the kernel's ``cost`` does not foresee. The exit code is 1
if any row fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch
import triton

import aot
from cna_kernels.scale import NEURON_BLOCK, Scale
from cna_kernels.triton import down_decode, gate_up_decode, steer, sums, swiglu
from cna_kernels.triton.cost import H200
from cna_kernels.triton.down_decode import down_gemv, down_split
from cna_kernels.triton.down_proj import cost as down_proj_cost
from cna_kernels.triton.down_proj import down_proj
from cna_kernels.triton.gate_up import cost as gate_up_cost
from cna_kernels.triton.gate_up import gate_up
from cna_kernels.triton.sums_fp64 import sum_fp64

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shapes import MODELS

TARGETS = (80, 90, 100, "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# feature -> (columns, act_sum, act_sumsq, scale)
FEATURES = {
    "plain": (0, False, False, False),
    "sums": (2, True, False, False),
    "sumsq": (2, False, True, False),
    "scale": (0, False, False, True),
    "both": (2, True, False, True),
    "one circuit": (0, False, False, True),
    "all": (2, True, True, True),
    "4 columns": (4, True, True, True),
    "16 columns": (16, True, True, True),
    "100 columns": (100, True, True, True),
}
FEW = ("plain", "sums", "scale", "both", "all")
MATRIX_SUMS = ("4 columns", "100 columns")


def blank(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def extras(T, N, feature):
    n_circuits = 1 if feature == "one circuit" else 256
    columns, act_sum, act_sumsq, scale = FEATURES[feature]
    fp32, int32 = torch.float32, torch.int32
    chosen = {}
    if columns:
        chosen["token_weight"] = blank(T, columns, dtype=fp32)
        chosen["act_sum"] = blank(columns, N, dtype=fp32) if act_sum else None
        chosen["act_sumsq"] = blank(columns, N, dtype=fp32) if act_sumsq else None
    if scale:
        offsets = blank(n_circuits, -(-N // NEURON_BLOCK) + 1, dtype=int32)
        chosen["scale"] = Scale(offsets, blank(9999, dtype=int32), blank(9999, dtype=fp32))
        chosen["row_circuit"] = blank(T, dtype=int32)
    return chosen


def split(act, w_down, *, scale=None, row_circuit=None, **sums):
    """Launch what the plan ``split`` of down_proj launches."""
    steered = None if scale is None else swiglu.steer_act(act, scale=scale, row_circuit=row_circuit)
    return down_split(act, w_down, steered, **sums, dependent=not sums)


# op -> (a call with T, dtype, extras; the T to compile; features). Every kernel, at every setting of its launch table.
def launchers(model):
    H, N = MODELS[model]

    def halves(T, d):
        return blank(T, 2 * N, dtype=d).chunk(2, dim=1)

    return {
        "swiglu": (lambda T, d, x: swiglu.swiglu(*halves(T, d), **x), (4096,), tuple(FEATURES)),
        "steer_act": (lambda T, d, x: swiglu.steer_act(blank(T, N, dtype=d), **x), (4096,), FEW[1:] + MATRIX_SUMS),
        "gate_up_decode": (
            lambda T, d, x: gate_up_decode.gate_up_decode(blank(T, H, dtype=d), blank(2 * N, H, dtype=d), **x),
            (1, 2, 3, 4, 16, 32, 64),
            ("plain", "both", "all", "16 columns"),
        ),
        "down_gemv": (
            lambda T, d, x: down_gemv(blank(T, N, dtype=d), blank(H, N, dtype=d), dependent=True),
            (1, 2, 3, 4),
            ("plain",),
        ),
        "down_split": (
            lambda T, d, x: split(blank(T, N, dtype=d), blank(H, N, dtype=d), **x),
            (1, 32, 64, 200),
            FEW,
        ),
        "sum_fp64": (
            lambda T, d, x: sum_fp64(
                blank(T, N, dtype=d), x["token_weight"], *(blank(*x["act_sum"].shape, dtype=torch.float64),) * 2
            ),
            (4096,),
            ("all", "100 columns"),
        ),
        "patch": (
            lambda T, d, x: steer.patch(blank(T, N, dtype=d), x["scale"], x["row_circuit"]),
            (4096,),
            ("scale",),
        ),
        "down_proj": (
            lambda T, d, x: down_proj(blank(T, N, dtype=d), blank(H, N, dtype=d), **x),
            (512, 4096),
            ("plain", "sums", "scale", "all", *MATRIX_SUMS),
        ),
        "gate_up": (
            lambda T, d, x: gate_up(blank(T, H, dtype=d), blank(2 * N, H, dtype=d), **x),
            (4096,),
            (*FEW, *MATRIX_SUMS),
        ),
    }


# Kernels for few tokens fetch ahead through shared memory, and hold two stages there or more. Where the compiler gives
# up fetching ahead, a kernel holds one, and waits for every load. Kernel -> 16-bit numbers of a stage.
FETCH_AHEAD = {
    "gate_up_flat_kernel": lambda block: (2 * block["BLOCK_N"] + block["BLOCK_T"]) * block["BLOCK_K"],
    "down_split_kernel": lambda block: (block["BLOCK_H"] + block["BLOCK_T"]) * block["BLOCK_N"],
}
MATRIX = {"gate_up_flat_kernel", "down_split_kernel", "down_proj_kernel", "gate_up_kernel"}


def ships(target, op, T, dtype, feature):
    """Whether any plan runs the op with this T, dtype and feature on the target."""
    itemsize = DTYPES[dtype].itemsize
    gemv = gate_up_decode.max_gemv_tokens(itemsize) >= T
    if not isinstance(target, int):  # AMD: elementwise only, no tf32x3
        return op in ("swiglu", "steer_act", "patch") and feature not in ("16 columns", "100 columns")
    return {
        "gate_up_decode": gemv if itemsize == 4 else T not in (2, 3, 4),
        "down_gemv": gemv,
        "down_proj": target >= 90 and itemsize == 2,
        "gate_up": target == 90 and itemsize == 2,
    }.get(op, True)


def variants(targets, quick):
    """Yield (target, op, model, T, dtype, feature) of every variant that is compiled."""
    for target, model in itertools.product(targets, MODELS):
        main = model == "Llama-3.1-8B"
        for op, (_, tokens, features) in launchers(model).items():
            for T, dtype, feature in itertools.product(tokens, DTYPES, features):
                if not ships(target, op, T, dtype, feature):
                    continue
                if not main and (quick or target != 90 or dtype != "bf16" or feature not in ("plain", "both")):
                    continue
                if dtype != "bf16" and feature not in ("plain", "all", "4 columns", "100 columns"):
                    continue
                # quick: every feature for sm_90 in bf16, two features elsewhere
                if quick and (dtype != "bf16" or target != 90) and feature not in ("all", "100 columns"):
                    continue
                yield target, op, model, T, dtype, feature


def compile_one(job):
    """Every kernel of one variant as table rows."""
    target, op, model, T, dtype, feature = job
    call, _, _ = launchers(model)[op]
    _, N = MODELS[model]
    rows = []
    for c in aot.compile_launches(target, lambda: call(T, DTYPES[dtype], extras(T, N, feature))):
        row = dict(
            kernel=c.kernel,
            op=op,
            target=f"sm_{target}" if isinstance(target, int) else target,
            model=model,
            T=T,
            dtype=dtype,
            feature=feature,
            warps=c.num_warps,
            registers=c.registers,
            spill_bytes=c.spills,
            shared=c.shared,
            **c.counts,
            register_a=c.register_a,
            overwritten=c.overwritten,
            per_item=per_item(c),
            notices=c.notices,
            block={k: v for k, v in c.block.items() if k.startswith("BLOCK")},
        )
        row["failures"] = failures(row, target)
        rows.append(row)
    return rows


def per_item(c):
    """Instructions of the working loop for each element (swiglu) or weight (the multiply-add kernels).

    Returns None for other kernels, and where ptxas has unrolled the loop away (small N or H).
    """
    tile = {
        "swiglu_kernel": lambda b: b["BLOCK_T"] * b["BLOCK_N"],
        "gate_up_gemv_kernel": lambda b: 2 * b["BLOCK_N"] * b["BLOCK_K"],
        "down_gemv_kernel": lambda b: b["BLOCK_H"] * b["BLOCK_N"],
    }.get(c.kernel, lambda b: 0)(c.block)
    each = tile / (32 * c.num_warps)  # items (elements or weights) of one thread
    if not tile or sum(opcode.startswith(("FFMA", "FMUL", "MUFU")) for opcode in c.loop) < each:
        return None
    return round(len(c.loop) / each, 1)


def foreseen(row):
    """Instructions for each element or weight by the kernel's cost function; None where it has no such number."""
    columns, act_sum, act_sumsq, _ = FEATURES[row["feature"]]
    if row["dtype"] == "fp32":
        return None
    if row["op"] == "swiglu" and row["kernel"] == "swiglu_kernel" and columns <= sums.FEW_COLUMNS:
        return swiglu.per_element(columns, act_sum and act_sumsq)
    if row["kernel"] == "gate_up_gemv_kernel":
        return gate_up_decode.per_weight(row["T"])
    if row["kernel"] == "down_gemv_kernel":
        return down_decode.per_weight(row["T"])
    return None


def failures(row, target):
    """What is wrong with a row, in words; empty if nothing is."""
    found = []
    if row["spill_bytes"] or row.get("local"):
        found.append(f"spills {row['spill_bytes']} bytes, {row.get('local', 0)} local loads and stores")
    if not isinstance(target, int):
        return found
    if any(notice.startswith("C75") for notice in row["notices"]):
        found.append(f"ptxas notice {', '.join(row['notices'])}")
    if row["shared"] > aot.SHARED_LIMIT[target]:
        found.append(f"{row['shared']} bytes of shared memory, limit {aot.SHARED_LIMIT[target]}")
    if target == 90 and row["kernel"] in MATRIX and row["dtype"] != "fp32" and (not row["HGMMA"] or row["HMMA"]):
        found.append("no wgmma")
    if target == 90 and row["kernel"] in FETCH_AHEAD and row["dtype"] != "fp32":
        stage = 2 * FETCH_AHEAD[row["kernel"]](row["block"])
        if row["shared"] < 2 * stage:
            what = f"{row['shared']} bytes of shared memory, a stage has {stage}"
            found.append(f"weights are not fetched ahead: {what}")
    if row.get("overwritten"):
        found.append(f"left factor overwritten while it is read: {row['overwritten'][0]}")
    if target == 90 and row["op"] == "swiglu" and row["kernel"] == "swiglu_kernel" and not row["load128"]:
        found.append("no 128-bit loads")
    if target == 90 and row["op"] == "swiglu" and row["feature"] == "both" and (row["per_item"] or 0) > 28:
        found.append(f"{row['per_item']} instructions an element, at most 28 wanted")
    expected = foreseen(row) if target == 90 else None
    if expected and row["per_item"] and not 0.75 <= row["per_item"] / expected <= 1.25:
        found.append(f"{row['per_item']} instructions an item, cost() counts with {expected:.1f}")
    return found


PREDICTED = ["model", "T", "kernel", "megabytes", "memory_us", "matrix_us", "issue_us", "bound"]
COLUMNS = ["kernel", "target", "model", "T", "dtype", "feature", "registers", "spill_bytes", "shared"]
COLUMNS += ["HGMMA", "register_a", "UTCMMA", "HMMA", "load128", "tma", "MUFU", "all", "per_item", "notices", "failures"]


def table(rows, columns):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(name) for name in columns]
        cells = ["" if c is None else "; ".join(c) if isinstance(c, list) else str(c) for c in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def predictions():
    """What the kernels' cost functions predict for an H200 with two columns of sums: table rows."""
    for model, (H, N) in MODELS.items():
        for T, name, cost in (
            (1, "gate_up_gemv", gate_up_decode.cost(1, N, H)),
            (1, "down_gemv", down_decode.cost(1, N, H, gemv=True)),
            (16, "gate_up_flat", gate_up_decode.cost(16, N, H)),
            (16, "down_split", down_decode.cost(16, N, H)),
            (64, "gate_up_flat", gate_up_decode.cost(64, N, H)),
            (64, "down_split", down_decode.cost(64, N, H)),
            (4096, "swiglu", swiglu.cost(4096, N, 2)),
            (4096, "down_proj", down_proj_cost(4096, N, H, 2)),
            (4096, "gate_up", gate_up_cost(4096, N, H, 2)),
        ):
            times = cost.seconds(H200)
            bound = max(times, key=times.get)
            yield dict(model=model, T=T, kernel=name, megabytes=round(cost.bytes / 1e6, 1), bound=bound) | {
                f"{resource}_us": round(1e6 * seconds, 1) for resource, seconds in times.items()
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--quick", action="store_true", help="one model shape, and fewer features outside bf16")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    targets = [int(t) if t.isdigit() else t for t in args.targets.split(",")]
    jobs = list(variants(targets, args.quick))
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        rows = [row for rows in pool.imap(compile_one, jobs, chunksize=8) for row in rows]
    seconds = time.monotonic() - start
    bad = [row for row in rows if row["failures"]]
    names = sorted({row["kernel"] for row in rows})
    summary = (
        f"Triton {triton.__version__}: {len(rows)} kernels from {len(jobs)} variants for {args.targets}, "
        f"{len(bad)} failures, {seconds:.0f} s"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"compile_gate_triton_{triton.__version__}"
    predicted = list(predictions())
    everything = dict(triton=triton.__version__, rows=rows, predicted=predicted)
    (args.out / f"{name}.json").write_text(json.dumps(everything, indent=0) + "\n")
    (args.out / f"{name}.md").write_text(
        f"# Compile gate\n\n{summary}\n\n{table(rows, COLUMNS)}\n"
        f"# Predicted for an {H200.name}, bf16, two columns of sums\n\n{table(predicted, PREDICTED)}"
    )
    for name in names:
        of = [row for row in rows if row["kernel"] == name]
        most = max(of, key=lambda row: row["registers"])
        shared = max(row["shared"] for row in of)
        print(f"{name:22s} {len(of):4d} rows, at most {most['registers']} registers, {shared} B of shared memory")
    for row in bad:
        print("FAIL", *(str(row[c]) for c in COLUMNS[:6]), *row["failures"], file=sys.stderr)
    print(summary)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
