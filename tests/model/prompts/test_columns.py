"""Folds and bootstrap replicates as columns: which prompts each of them counts."""

import numpy as np
import pytest
import torch

from cna_kernels.model.prompts.columns import Columns
from cna_kernels.model.prompts.corpus import Contrast, Entry


def entries(n, first_turn=0):
    return [Entry(f"text {number}", f"p:{number}", ((0, 1.0, first_turn + number),)) for number in range(n)]


def test_slots_are_the_columns_then_what_contrasts_derive():
    columns = Columns(4, (Contrast("a", 0, 1), Contrast("b", 3, 1)), folds=2, bootstrap=3)
    assert columns.derived(0) == [4, 5, 6, 7, 8] and columns.derived(1) == [9, 10, 11, 12, 13]
    assert columns.derived(3) == [14, 15, 16, 17, 18] and columns.derived(2) == []
    slots, weights = columns.weights([Entry("x", "p", ((2, 2.5, 0),)), Entry("y", "p", ((3, 0.5, 1),))], 0)
    assert slots == [2, 3, 14, 15, 16, 17, 18]
    assert weights[0].tolist() == [2.5, 0, 0, 0, 0, 0, 0] and weights[1, :4].tolist() == [0, 0.5, 0, 0.5]


def test_every_prompt_is_in_one_fold():
    columns = Columns(2, (Contrast("a", 0, 1),), folds=3)
    _, weights = columns.weights(entries(10, first_turn=100), 0)
    assert torch.equal(weights[:, 1:].sum(1), torch.ones(10)) and weights[:, 1:].sum(0).tolist() == [3, 4, 3]
    assert weights[0, 1:].tolist() == [0, 1, 0]  # 100 % 3


def test_replicates_do_not_depend_on_the_cut_into_units():
    columns = Columns(2, (Contrast("a", 0, 1),), bootstrap=7, seed=5)
    slots, whole = columns.weights(entries(50), 0)
    assert slots == [0, *range(2, 9)]
    for first, last in ((0, 1), (13, 20), (49, 50)):
        assert torch.equal(columns.weights(entries(50)[first:last], first)[1], whole[first:last])
    other = Columns(2, (Contrast("a", 0, 1),), bootstrap=7, seed=6)
    assert not torch.equal(other.weights(entries(50), 0)[1], whole)
    assert len({tuple(column.tolist()) for column in whole.T}) == 8, "every replicate draws for itself"


def test_replicates_are_poisson_with_mean_one():
    drawn = Columns(1, (Contrast("a", 0, 0),), bootstrap=50, seed=1).weights(entries(4000), 0)[1][:, 1:].numpy()
    n = drawn.size
    for count, chance in enumerate((0.36788, 0.36788, 0.18394, 0.06131)):
        found = (drawn == count).mean()
        assert abs(found - chance) < 5 * np.sqrt(chance / n), (count, found)
    assert drawn.max() < 12


@pytest.mark.parametrize("bootstrap", [1, 4, 5])
def test_columns_without_contrasts_have_no_replicates(bootstrap):
    slots, weights = Columns(1, (), bootstrap=bootstrap).weights(entries(3), 0)
    assert slots == [0] and weights.tolist() == [[1], [1], [1]]
