"""The compile gate's rules, on rows made up to break each of them. `make compile-gate` applies them to real rows."""

import pytest

import compile_gate
import register_a
import sass

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
    block = dict(BLOCK_T=64, BLOCK_N=32, BLOCK_K=64)
    few = PRODUCT | dict(kernel="gate_up_flat_kernel", op="gate_up_decode", shared=49_152, block=block)
    assert compile_gate.failures(few, 90) == []
    assert compile_gate.failures(few | dict(shared=16_384), 90) == [
        "weights are not fetched ahead: 16384 bytes of shared memory, a stage has 16384"
    ]
    split = few | dict(kernel="down_split_kernel", op="down_split", block=dict(BLOCK_T=16, BLOCK_H=64, BLOCK_N=128))
    assert compile_gate.failures(split, 90) == [] and compile_gate.failures(split | dict(shared=40_959), 90)


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
    code = sass.instructions(SASS)
    assert [one.opcode for one in code][:4] == ["MOV", "LDG.E.128", "MUFU.EX2", "FFMA"]
    assert [one.guard for one in code][:4] == [None, None, "!P0", None]
    assert sass.working_loop(code) == ["LDG.E.128", "MUFU.EX2", "FFMA", "BRA"]


# A loop with two groups. The wait lets one group run on: after it the group of R8 still runs, and that of R4 is over.
PRODUCTS = """
        LDSM.16.M88.4 R4, [R2] ;
        LDSM.16.M88.4 R8, [R2+0x800] ;
.L_x_1:
        WARPGROUP.ARRIVE ;
        HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        STS [R4], R5 ;
        ISETP.NE.AND P0, PT, R4, RZ, PT ;
        WARPGROUP.ARRIVE ;
        HGMMA.64x256x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0 ;
        WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        LDSM.16.M88.4 R4, [R2] ;
        IADD3 R12, P1, R12, 0x1, RZ ;
    @P0 BRA `(.L_x_1) ;
        WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        MOV R8, RZ ;
        EXIT ;
"""


@pytest.mark.parametrize(
    ("before", "after", "culprit"),
    [
        ("IADD3 R12,", "IADD3 R12,", None),
        ("STS [R4], R5", "MOV R6, R5", "MOV R6, R5"),  # in the group itself, before it is closed
        ("STS [R4], R5", "MOV R8, R5", "MOV R8, R5"),  # one loop later: the wait let this group run on
        ("IADD3 R12,", "IADD3 R5,", None),  # the older group is over
        ("IADD3 R12,", "IADD3 R8,", "IADD3 R8, P1"),  # the younger group still runs
        ("IADD3 R12,", "IMAD.WIDE R10,", "IMAD.WIDE R10"),  # a pair of registers reaches into A
        ("LDSM.16.M88.4 R4, [R2] ;\n        IADD3", "LDSM.16.M88.4 R6, [R2] ;\n        IADD3", "M88.4 R6"),
        ("gsb0, 0x0 ;\n        MOV", "gsb0, 0x1 ;\n        MOV", "MOV R8, RZ"),  # after the loop: the wait is too short
        ("STS [R4], R5", "SHFL.BFLY PT, R7, R1, 0x1, 0x1f", "SHFL.BFLY PT, R7"),
    ],
)
def test_left_factors_overwritten_early_are_found(before, after, culprit):
    assert before in PRODUCTS
    found = register_a.scan(PRODUCTS.replace(before, after))
    assert found.n_instructions == 2
    if culprit is None:
        assert found.overwritten == []
    else:
        assert len(found.overwritten) == 1 and culprit in found.overwritten[0]
        row = PRODUCT | dict(register_a=2, overwritten=found.overwritten)
        assert "left factor overwritten" in compile_gate.failures(row, 90)[0]


def test_everything_that_ships_is_listed():
    variants = list(compile_gate.variants([80, 90, 100], quick=False))
    for target in (80, 90, 100):
        ops = {op for t, op, *_ in variants if t == target}
        assert ops >= {"swiglu", "steer_act", "gate_up_decode", "down_gemv", "down_split"}
        assert ("down_proj" in ops) == (target >= 90) and ("gate_up" in ops) == (target == 90)
