"""The hash of a model's weights: what changes it, and what must not."""

import pytest
import torch

from cna_kernels.fingerprint import Marks, decoder_sha256, in_threads, marks_sha256


def weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


SHAPES = [(1,), (7,), (8,), (3, 1), (4, 8), (5, 11), (2, 3, 9), (3, 40_000), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_and_layout_do_not_change_the_hash(shape):
    bits = weight(*shape)
    same = marks_sha256(bits)
    apart = torch.empty(bits.numel() + 3, dtype=bits.dtype)[3:].view(shape).copy_(bits)
    assert len(same) == 64 and {marks_sha256(x) for x in (bits.float(), bits.double(), apart)} == {same}
    if len(shape) == 2:
        assert marks_sha256(bits.T.contiguous().T) == same
        marks = Marks()
        for row in bits.split(1):
            marks.add(row)
        assert marks.sha256(shape) == same, "in pieces"


def changed(x, place, value):
    x = x.clone()
    x[place] = value
    return x


ODD = weight(5, 11)
OTHERS = {
    "the smallest step of one number": ODD.view(torch.int16)
    .bitwise_xor(torch.eye(5, 11).to(torch.int16))
    .view(ODD.dtype),
    "a sign": changed(ODD, (4, 10), -ODD[4, 10]),
    "a row of zeros": changed(ODD, 2, 0),
    "a column of zeros": changed(ODD, (slice(None), 10), 0),
    "rows swapped": ODD[[1, 0, 2, 3, 4]],
    "columns swapped": ODD[:, [1, 0, *range(2, 11)]],
    "words swapped": ODD[:, [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10]],
    "a row less": ODD[:4],
    "a column less": ODD[:, :10],
    "a column of zeros more": torch.nn.functional.pad(ODD, (0, 1)),
    "transposed": ODD.T,
    "flat": ODD.flatten(),
}


def test_anything_else_changes_the_hash():
    found = {name: marks_sha256(x) for name, x in OTHERS.items()}
    assert len({marks_sha256(ODD), *found.values()}) == 1 + len(OTHERS), found


@pytest.mark.parametrize("bit", range(16))
def test_two_changes_of_a_row_do_not_cancel(bit):
    """One bit of two numbers of a row, whose places in their words are equal: two signs, two exponents, and so on."""
    generator = torch.Generator().manual_seed(bit)
    rows = torch.randn(200, 512, generator=generator).bfloat16()
    places = torch.stack([torch.randperm(128, generator=generator)[:2] for _ in rows]) * 4 + 3
    flips = torch.zeros(rows.shape, dtype=torch.int16)
    flips.scatter_(1, places, torch.full(places.shape, -(2**15) if bit == 15 else 2**bit, dtype=torch.int16))
    flipped = rows.view(torch.int16) ^ flips
    found, expected = (Marks(), Marks())
    found.add(flipped.view(torch.bfloat16))
    expected.add(rows)
    assert (torch.cat(found._marks) != torch.cat(expected._marks)).all()


def test_names_count():
    one = {"a": "1", "b": "2"}
    hashes = [
        decoder_sha256(x) for x in (one, {"b": "2", "a": "1"}, {"a": "2", "b": "1"}, {"a": "1"}, {"a1": "", "b": "2"})
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_results_in_order():
    assert in_threads(lambda n: n * n, range(100)) == [n * n for n in range(100)]
