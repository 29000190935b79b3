"""Sums over parameter-shaped vectors: in which precision, and which entries count."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from warmctl.vectors import dot, gathered, random_like, significant, square_norm, squares


def test_nothing_is_significant_in_a_gradient_of_zeros() -> None:
    assert not any(keep.any() for keep in significant([torch.zeros(3), torch.zeros(0)], 0.0))
    assert significant([torch.tensor([1.0, 1e-8, -1e-6, 0.0])], 1.0)[0].tolist() == [True, False, True, False]


def test_sums_stay_in_float32_where_the_device_has_no_float64() -> None:
    with FakeTensorMode():
        vector = [torch.empty(3, device="mps"), torch.empty(2, 2, device="mps", dtype=torch.float16)]
        assert squares(vector).dtype == gathered([t.sum() for t in vector]).dtype == torch.float32
        assert squares([t.cpu() for t in vector]).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inner_products_of_half_precision_are_summed_in_more(dtype: torch.dtype) -> None:
    a = torch.full((3000,), 10.0, dtype=dtype)
    assert dot([a], [a + 0]) == 300_000.0  # more than float16 can hold, finer than bfloat16
    assert dot([a], [a.double()]) == 300_000.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_square_norm_on_the_host_is_that_of_squares(dtype: torch.dtype) -> None:
    a = [t.to(dtype) for t in random_like([torch.empty(300), torch.empty(7, 5), torch.empty(())], seed=0)]
    assert square_norm(a) == pytest.approx(float(squares(a).sum()), rel=1e-12)


def test_the_square_norm_of_what_is_too_large_or_not_finite() -> None:
    assert square_norm([torch.tensor([1e200], dtype=torch.float64)]) == math.inf
    assert math.isnan(square_norm([torch.tensor([math.nan])]))
