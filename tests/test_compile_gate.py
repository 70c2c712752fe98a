"""The compile gate's rules, on rows made up to break each of them. `make compile-gate` applies them to real ones."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import aot
import compile_gate

GOOD = dict(
    kernel="swiglu_kernel", op="swiglu", T=4096, dtype="bf16", feature="both", registers=96, spill_bytes=0, shared=32832
)
GOOD |= dict(model="Llama-3.1-8B", HGMMA=0, HMMA=0, UTCMMA=0, load128=24, local=0, per_item=22.0, notices=[])
PRODUCT = GOOD | dict(kernel="down_proj_kernel", op="down_proj", HGMMA=4, per_item=None)


@pytest.mark.parametrize("target", [80, 90, 100])
def test_good_rows_pass(target):
    assert compile_gate.failures(GOOD, target) == []
    assert compile_gate.failures(PRODUCT, target) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(spill_bytes=8), "spills 8 bytes"),
        (dict(local=2), "2 local loads and stores"),
        (dict(notices=["C7515"]), "ptxas notice C7515"),
        (dict(shared=232_449), "232449 bytes of shared memory, limit 232448"),
        (dict(load128=0), "no 128-bit loads"),
        (dict(per_item=28.1), "28.1 instructions an element, at most 28 wanted"),
        (dict(per_item=10.0), "10.0 instructions an item, cost() counts with"),
    ],
)
def test_each_rule_fails_a_row(change, words):
    assert any(words in failure for failure in compile_gate.failures(GOOD | change, 90))


def test_products_need_wgmma_on_sm_90():
    assert compile_gate.failures(PRODUCT | dict(HGMMA=0, HMMA=64), 90) == ["no wgmma"]
    assert compile_gate.failures(PRODUCT | dict(HMMA=1), 90) == ["no wgmma"]
    assert compile_gate.failures(PRODUCT | dict(HGMMA=0, HMMA=64), 80) == []


def test_weights_must_be_fetched_ahead():
    few = PRODUCT | dict(kernel="gate_up_flat_kernel", op="gate_up_decode", shared=98_304)
    assert compile_gate.failures(few, 90) == []
    assert compile_gate.failures(few | dict(shared=49_152), 90) == [
        "weights are not fetched ahead: 49152 bytes of shared memory"
    ]


SASS = """
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 MUFU.EX2 R9, R8 ;
        /*0030*/                   { FFMA R1, R2, R3, R4 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   STL [R1], R4 ;
        /*0060*/               @P2 BRA `(.L_x_2) ;
"""


def test_machine_code_is_read():
    lines = aot._instructions(SASS)
    assert [opcode for _, opcode, _ in lines][:4] == ["MOV", "LDG.E.128", "MUFU.EX2", "FFMA"]
    assert aot._working_loop(lines) == ["LDG.E.128", "MUFU.EX2", "FFMA", "BRA"]


def test_everything_that_ships_is_listed():
    variants = list(compile_gate.variants([80, 90, 100], quick=False))
    for target in (80, 90, 100):
        ops = {op for t, op, *_ in variants if t == target}
        assert ops >= {"swiglu", "act_pass", "gate_up_decode", "down_gemv", "down_split"}
        assert (ops >= {"down_proj", "gate_up"}) == (target >= 90)
