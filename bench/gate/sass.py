"""NVIDIA machine code as nvdisasm prints it: instructions in order, and the loop that does the work."""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    label: str | None  # of the block that starts with this instruction
    guard: str | None  # "P0", "!P0": the predicate under which it runs
    opcode: str
    operands: str


# "        /*0a30*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
_INSTRUCTION = re.compile(
    r"\s*(?:/\*\w+\*/\s*)?(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\b(.*);"
)


def instructions(text: str) -> list[Instruction]:
    label, found = None, []
    for line in text.splitlines():
        if match := re.match(r"\s*(\.L_\w+):", line):
            label = match[1]
        elif match := _INSTRUCTION.match(line):
            found.append(Instruction(label, *match.groups()))
            label = None
    return found


def labels(code: list[Instruction]) -> dict[str, int]:
    """Label -> the number of the instruction that its block starts with."""
    return {one.label: i for i, one in enumerate(code) if one.label}


def target(one: Instruction) -> str | None:
    """The label that a branch jumps to; None for other instructions."""
    match = re.search(r"\.L_\w+", one.operands) if one.opcode.startswith("BRA") else None
    return match and match[0]


def working_loop(code: list[Instruction]) -> list[str]:
    """The opcodes of the innermost loop with the most MUFU, matrix and multiply-add instructions."""
    at = labels(code)
    spans = [(at[target(one)], i) for i, one in enumerate(code) if target(one) in at and at[target(one)] <= i]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [[one.opcode for one in code[first : last + 1]] for first, last in inner]
    return max(loops, key=lambda loop: sum(bool(re.match(r"MUFU|\w*MMA|FFMA", o)) for o in loop), default=[])
