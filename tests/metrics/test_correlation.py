"""Correlations: scipy's numbers, honest about what is not known, and right at any scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from xcli.metrics.correlation import pearson, ranks, spearman

DRAW = torch.Generator().manual_seed(0)
A, B = (torch.randint(0, 7, (4, 30), generator=DRAW).double() for _ in range(2))


@pytest.mark.parametrize(("ours", "theirs"), [(pearson, stats.pearsonr), (spearman, stats.spearmanr)])
def test_the_numbers_are_those_of_scipy_with_ties(ours, theirs):
    expected = [theirs(a, b)[0] for a, b in zip(A.numpy(), B.numpy(), strict=True)]
    assert_close(ours(A, B), torch.tensor(np.array(expected)))


def test_equal_values_share_their_ranks():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_what_is_not_known_or_constant_has_no_correlation(correlation):
    broken = A.clone()
    broken[0, 3] = torch.nan
    broken[1] = 2.0
    found = correlation(broken, B)
    assert found.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e20, 1e30])
def test_the_scale_of_a_map_does_not_matter_in_float32(scale):
    assert_close(pearson(A.float() * scale, B.float()).double(), pearson(A, B), rtol=0, atol=1e-5)
