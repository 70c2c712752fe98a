"""Matrix instructions of sm_90 whose left factor lies in registers: does anything overwrite it too early?

An HGMMA still runs while its threads go on. Where its left factor A is in registers (a tile that was steered, or
computed, just before), these registers must keep their values until ``WARPGROUP.DEPBAR`` has waited for the HGMMA's
group. ptxas before 13.3 does not always ensure this (triton-lang/triton#9433), and then a product is sometimes wrong.
Triton 3.6 assembles sm_90 with ptxas 12.8, so this file reads the machine code.

From each HGMMA with A in registers, it follows every path to the wait, and reports an instruction on the way that
writes one of A's four registers. An opcode that this file does not know counts as writing its first register.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import sass

_REGISTER_A = re.compile(r"\s*R\d+, R(\d+), gdesc")
_N_REGISTERS = 4  # of a thread: 64 rows of 32 bytes over 128 threads

# Opcodes whose first operand may be a register, but which write none, or only predicates.
_WRITES_NOTHING = re.compile(r"HGMMA|BAR|BRX|JMX|RET|CALL|WARPSYNC|NANOSLEEP|WARPGROUP|\w+SETP|FCHK|R2P")
# "PT, R5, R4": predicates may come before the register.
_FIRST_REGISTER = re.compile(r"\s*(?:!?U?P\w+,\s*)*R(\d+)\b")


class Scan(NamedTuple):
    n_instructions: int  # HGMMAs with A in registers
    overwritten: list[str]  # "HGMMA ... | MOV ...": each HGMMA that loses A, and the instruction that overwrites A


def scan(text: str) -> Scan:
    """Read the machine code of one kernel."""
    code = sass.instructions(text)
    at = sass.labels(code)
    n_instructions, overwritten = 0, []
    for i, one in enumerate(code):
        match = _REGISTER_A.match(one.operands) if one.opcode.startswith("HGMMA") else None
        if match:
            n_instructions += 1
            first = int(match[1])
            culprit = _first_write(code, at, i, set(range(first, first + _N_REGISTERS)))
            if culprit:
                overwritten.append(f"{one.opcode}{one.operands}| {culprit.opcode}{culprit.operands}".strip())
    return Scan(n_instructions, overwritten)


def _first_write(code, at, start, registers):
    """The first instruction after ``start`` that writes one of the registers before the group of ``start`` is over.

    A step is (instruction, number of groups closed after the group of ``start``). "gsb0" on an HGMMA closes a group; -1
    says that the group of ``start`` is still open. DEPBAR.LE gsb0, n waits until at most n groups run.
    """
    closed = 0 if "gsb0" in code[start].operands else -1
    steps, seen = [(i, closed) for i in _next(code, at, start)], set()
    while steps:
        step = i, closed = steps.pop()
        if step in seen:
            continue
        seen.add(step)
        one = code[i]
        if one.opcode.startswith("HGMMA") and "gsb0" in one.operands:
            closed = min(closed + 1, 8)  # waits name at most 7 groups; without a limit the walk would not end
        wait = re.search(r"gsb0, (0x[0-9a-f]+)", one.operands) if one.opcode.startswith("WARPGROUP.DEPBAR") else None
        if wait and closed >= int(wait[1], 16):
            continue
        if registers & _written(one):
            return one
        steps += [(j, closed) for j in _next(code, at, i)]
    return None


def _next(code, at, i):
    """The numbers of the instructions that may run right after instruction i."""
    one = code[i]
    onward = [i + 1] if i + 1 < len(code) else []
    always = one.guard is None or one.guard == "PT"
    if one.opcode == "EXIT" and always:
        return []
    there = sass.target(one)
    if there is None:
        return onward
    conditional = not always or "," in one.operands  # "BRA.U UP0, `(.L_x_1)"
    return ([at[there]] if there in at else []) + (onward if conditional else [])


def _written(one):
    """The registers that an instruction writes."""
    match = _FIRST_REGISTER.match(one.operands)
    if _WRITES_NOTHING.match(one.opcode) or not match:
        return set()
    first = int(match[1])
    return set(range(first, first + _width(one.opcode)))


def _width(opcode):
    """How many 32-bit registers an instruction writes; the most possible where the opcode does not tell."""
    parts = opcode.split(".")
    if parts[0] in ("HMMA", "IMMA", "QMMA") or ({"128", "M88"} & set(parts) and "2" not in parts):
        return 4
    if parts[0] == "CS2R":
        return 1 if "32" in parts else 2
    return 2 if {"64", "WIDE", "2", "F64"} & set(parts) or parts[0] in ("DADD", "DMUL", "DFMA") else 1
